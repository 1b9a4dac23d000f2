"""How well each class is recognised, as plain values for a file.

Shapes: M images, C classes.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

MAX_CLASSES = 100  # of a confusion matrix that is written: of a thousand nobody could look at it


def class_accuracies(
    labels: Tensor, predictions: Tensor, num_classes: int, names: Sequence[str] | None
) -> dict[str, Any]:
    """`classes`, `num_images` and `accuracy` [%] of each (null where a class has no images), and the `confusion`:
    images of the class of the row that were taken for that of the column, for at most 100 classes.

    Args:
        labels, predictions: [M] whole numbers from 0 to C - 1.
        names: of the classes; None: their numbers.
    """
    num_images = labels.bincount(minlength=num_classes).tolist()
    hits = labels[labels == predictions].bincount(minlength=num_classes).tolist()
    content: dict[str, Any] = {
        "classes": list(names) if names is not None else [str(label) for label in range(num_classes)],
        "num_images": num_images,
        "accuracy": [100.0 * hit / count if count else None for hit, count in zip(hits, num_images, strict=True)],
    }
    if num_classes <= MAX_CLASSES:
        pairs = (labels * num_classes + predictions).bincount(minlength=num_classes**2)
        content["confusion"] = pairs.view(num_classes, num_classes).tolist()
    return content
