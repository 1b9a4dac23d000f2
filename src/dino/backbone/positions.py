"""The learned position table of a vision transformer, for image sizes other than the one it was learned at.

Shapes: D features, P positions in the table (a square grid), one more for the class token.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def resize_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """The table `[1, 1 + P, D]`, class token first, resampled to `[1, 1 + rows * columns, D]`.

    Bicubic without antialiasing. The scale factors carry the original's + 0.1 (vision_transformer.py,
    interpolate_pos_encoding): it was meant against rounding, but it also moves the sampled points, so weights that
    were trained with it expect it. A table asked for at its own size is returned unchanged.
    """
    side = grid_side(table)
    assert side is not None, "the table is not a class token and a square grid"
    if (rows, columns) == (side, side):
        return table
    grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # [1, D, side, side]
    scale = ((rows + 0.1) / side, (columns + 0.1) / side)
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False)
    assert grid.shape[-2:] == (rows, columns), "the scale factors missed the wanted grid"
    return torch.cat((table[:, :1], grid.flatten(2).transpose(1, 2)), dim=1)


def grid_side(table: Tensor) -> int | None:
    """Patches per side of the square grid in a table `[1, 1 + P, D]`; None if P is no square number."""
    if table.ndim != 3 or table.shape[1] < 2:
        return None
    side = math.isqrt(table.shape[1] - 1)
    return side if side * side == table.shape[1] - 1 else None
