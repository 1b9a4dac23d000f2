"""Images in rows and labelled columns, for a person to look at.

Shapes: B images, C channels, h x w pixels.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from PIL import Image, ImageDraw
from torch import Tensor

_GAP: Final = 4
_LABEL_HEIGHT: Final = 16
_LABEL_WIDTH: Final = 52
_BACKGROUND: Final = (24, 24, 24)
_INK: Final = (235, 235, 235)


def write_sheet(columns: Sequence[tuple[str, Sequence[Image.Image]]], path: Path, *, small: bool = False) -> None:
    """Writes a PNG, whole or not at all: one labelled column for each of `columns`, one row for each of its images.

    Args:
        small: with at most 256 colours, which takes a third of the bytes.
    """
    widths = [max(_LABEL_WIDTH, *(image.width for image in images)) for _, images in columns]
    row_height = max(image.height for _, images in columns for image in images) + _GAP
    num_rows = max(len(images) for _, images in columns)
    width = _GAP + sum(widths) + len(widths) * _GAP
    sheet = Image.new("RGB", (width, _LABEL_HEIGHT + _GAP + num_rows * row_height), _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    left = _GAP
    for (label, images), column_width in zip(columns, widths, strict=True):
        pen.text((left, 2), label, fill=_INK)
        for row, image in enumerate(images):
            sheet.paste(image, (left, _LABEL_HEIGHT + _GAP + row * row_height))
        left += column_width + _GAP
    if small and sheet.getcolors(256) is None:
        sheet = sheet.quantize(256)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        sheet.save(temporary, format="PNG")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def pictures_of(images: Tensor, mean: Sequence[float] = (), std: Sequence[float] = ()) -> list[Image.Image]:
    """[B, C, h, w] to B pictures: float images after undoing the normalisation, uint8 images as they are.

    Images with more than three channels show their first three, images with two their first.

    Args:
        mean, std: of each channel, as float images were normalised.
    """
    images = images.cpu()
    if images.dtype != torch.uint8:
        restored = images * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        images = (restored * 255).round().clamp(0, 255).to(torch.uint8)
    shown = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    return [Image.fromarray(image.numpy()) for image in shown.permute(0, 2, 3, 1).contiguous()]


def magnified(picture: Image.Image, zoom: int) -> Image.Image:
    """Every pixel as `zoom` x `zoom` of them."""
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
