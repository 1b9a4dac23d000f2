"""A contact sheet of views: what the student sees, for a person to look at.

Shapes: B images, V views, C channels, h x w view size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dino.augmentation.views import ViewBatch

_SMALLEST_GLOBAL: Final = 64  # pixels; where global views are smaller, all views are magnified by one whole number
_GAP: Final = 4
_LABEL_HEIGHT: Final = 16
_LABEL_WIDTH: Final = 52
_BACKGROUND: Final = (24, 24, 24)
_INK: Final = (235, 235, 235)


def preview(views: ViewBatch, path: Path, mean: Sequence[float], std: Sequence[float]) -> None:
    """Writes a PNG with one row for each image and one labelled column for each view.

    Args:
        views: float views are shown after undoing the normalisation, uint8 views as they are.
        mean, std: of each channel, as the views were normalised. Images with more than three channels show their first
            three, images with two their first.
    """
    columns = [(f"global {i}", of_view) for i, of_view in enumerate(views.global_views)]
    if views.local_views is not None:
        columns += [(f"local {i}", of_view) for i, of_view in enumerate(views.local_views)]
    zoom = -(-_SMALLEST_GLOBAL // views.global_views.shape[-1])
    widths = [max(int(images.shape[-1]) * zoom, _LABEL_WIDTH) for _, images in columns]
    row_height = max(int(images.shape[-1]) for _, images in columns) * zoom + _GAP
    num_rows = views.global_views.shape[1]
    width = _GAP + sum(widths) + len(widths) * _GAP
    sheet = Image.new("RGB", (width, _LABEL_HEIGHT + _GAP + num_rows * row_height), _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    left = _GAP
    for (label, images), column_width in zip(columns, widths, strict=True):
        pen.text((left, 2), label, fill=_INK)
        for row, image in enumerate(_pixels(images, mean, std)):
            picture = Image.fromarray(image.numpy())
            picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, _LABEL_HEIGHT + _GAP + row * row_height))
        left += column_width + _GAP
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def _pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """[B, C, h, w] -> uint8 [B, h, w, 3] on the host."""
    images = images.cpu()
    if images.dtype != torch.uint8:
        restored = images * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        images = (restored * 255).round().clamp(0, 255).to(torch.uint8)
    shown = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    return shown.permute(0, 2, 3, 1).contiguous()
