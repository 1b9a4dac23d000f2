"""How well each class is recognised by k-NN, as the newest evaluation of the run has recorded it.

Shapes: C classes.
"""

import json
from typing import Any

import numpy as np

from dino.analysis.charts import HeatMap
from dino.analysis.history import Floats, History

ROWS = 20  # of the table: the classes that are recognised worst


def newest_classes(history: History) -> dict[str, Any] | None:
    """`knn.json` of training's last evaluation, with its `step`; None where there is none, or it is damaged."""
    files = sorted(history.directory.glob("evaluation/step_" + "[0-9]" * 8 + "/knn.json"))
    if not files:
        return None
    try:
        content = json.loads(files[-1].read_text())
        counts = [len(content[name]) for name in ("classes", "accuracy", "num_images")]
        sound = len(set(counts)) == 1 and np.shape(content.get("confusion", [])) in ((0,), (counts[0], counts[0]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {**content, "step": int(files[-1].parent.name.removeprefix("step_"))} if sound else None


def classes_of(history: History, mark: str = "") -> list[HeatMap]:
    """The drawing of a run; `mark` ends the name of its element. None where there are too many classes."""
    content = newest_classes(history)
    return [_confusion_map(content, mark)] if content is not None and "confusion" in content else []


def _confusion_map(content: dict[str, Any], mark: str) -> HeatMap:
    """Shares of each true class (rows) that were taken for each class."""
    counts = np.array(content["confusion"], float)
    shares: Floats = 100.0 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
    return HeatMap(
        name=f"confusion{mark}",
        title="Which classes are taken for which",
        caption=f"k-NN, k = {content['k']}, at step {content['step']}; a row is a true class, in % of its images.",
        x="taken for",
        columns=content["classes"],
        rows=content["classes"],
        values=shares,
        unit="%",
    )


def worst_classes(content: dict[str, Any]) -> list[list[str]]:
    """Name, images and accuracy of the classes that are recognised worst, worst first."""
    rows = zip(content["classes"], content["num_images"], content["accuracy"], strict=True)
    known = sorted((row for row in rows if row[2] is not None), key=lambda row: row[2])
    return [[str(name), f"{count:,}", f"{accuracy:.1f} %"] for name, count, accuracy in known[:ROWS]]
