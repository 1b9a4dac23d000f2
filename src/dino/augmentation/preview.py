"""A contact sheet of views: what the student sees, for a person to look at.

Shapes: B images, V views.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dino.augmentation.views import ViewBatch
from dino.contact_sheet import magnified, pictures_of, write_sheet

_SMALLEST_GLOBAL: Final = 64  # pixels; where global views are smaller, all views are magnified by one whole number


def preview(views: ViewBatch, path: Path, mean: Sequence[float], std: Sequence[float]) -> None:
    """Writes a PNG with one row for each image and one labelled column for each view.

    Args:
        views: float views are shown after undoing the normalisation, uint8 views as they are.
        mean, std: of each channel, as the views were normalised. Images with more than three channels show their first
            three, images with two their first.
    """
    named = [(f"global {i}", of_view) for i, of_view in enumerate(views.global_views)]
    if views.local_views is not None:
        named += [(f"local {i}", of_view) for i, of_view in enumerate(views.local_views)]
    zoom = -(-_SMALLEST_GLOBAL // views.global_views.shape[-1])
    write_sheet(
        [(label, [magnified(view, zoom) for view in pictures_of(images, mean, std)]) for label, images in named], path
    )
