"""Products with weight-normed prototypes: what the head ends in, and what the loss may take apart.

Shapes: N rows, K prototypes, b bottleneck.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SLICE: Final = 4096  # prototypes that are handled at a time: few enough to stay in a cache, enough for a matrix product


@dataclass(frozen=True)
class Projection:
    """Rows and prototypes whose products are the logits [N, K], made only where they are needed.

    Products are made in the type of the rows, which is that of autocast; the prototypes keep the parameters' own.
    """

    rows: Tensor  # [N, b], each of length 1
    directions: Tensor  # [K, b], weight_v of the last layer; of any length
    gains: Tensor  # [K, 1], weight_g

    def logits(self) -> Tensor:
        """`[N, K]`, without a copy of the prototypes in the parameters' type."""
        logits: Tensor = _Logits.apply(self.rows, self.directions, self.gains)
        return logits

    def prototypes(self) -> Tensor:
        """`[K, b]`, each row of length `gains`: weight norm written out, the slow and plain way to the logits."""
        lengths: Tensor = torch.linalg.vector_norm(self.directions, dim=1, keepdim=True)
        return self.directions * (self.gains / lengths)

    def chunk(self, number: int) -> list["Projection"]:
        """The rows in `number` equal parts, such as views, over the same prototypes."""
        return [Projection(rows, self.directions, self.gains) for rows in self.rows.chunk(number)]


def slices(number: int, size: int = SLICE) -> Iterator[slice]:
    """0..number in parts of `size`."""
    return (slice(start, min(start + size, number)) for start in range(0, number, size))


def column_scales(directions: Tensor, gains: Tensor) -> Tensor:
    """`[K]`: the prototype is its direction times this."""
    lengths: Tensor = torch.linalg.vector_norm(directions, dim=1)
    return gains[:, 0] / lengths


def direction_gradient(products: Tensor, directions: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of some prototypes [k, b] to those of their directions [k, b] and gains [k, 1].

    With w = g v / |v|: dg = dw . v / |v|, dv = g / |v| (dw - (dw . v) v / |v|^2). `products` is overwritten.
    """
    squares = directions.square().sum(dim=1, keepdim=True)
    along = (products * directions).sum(dim=1, keepdim=True)
    gains = along * squares.rsqrt()
    return products.addcmul_(directions, along / squares, value=-1).mul_(scales[:, None]), gains


class _Logits(torch.autograd.Function):
    """rows [N, b], directions [K, b], gains [K, 1] -> logits [N, K] in the type of the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, directions: Tensor, gains: Tensor) -> Tensor:
        scales = column_scales(directions, gains)
        prototypes = torch.empty(directions.shape, dtype=rows.dtype, device=rows.device)
        for part in slices(len(directions)):
            prototypes[part] = directions[part] * scales[part, None]
        ctx.save_for_backward(rows, directions, scales, prototypes)
        with torch.autocast(rows.device.type, enabled=False):
            return rows @ prototypes.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, directions, scales, prototypes = ctx.saved_tensors
        of_rows, of_directions, of_gains = ctx.needs_input_grad
        gradient_v = torch.empty_like(directions) if of_directions else None
        gradient_g = torch.empty_like(scales)[:, None] if of_gains else None
        if of_directions or of_gains:
            for part in slices(len(directions)):
                products = (gradient[:, part].T @ rows).to(directions.dtype)
                part_v, part_g = direction_gradient(products, directions[part], scales[part])
                if gradient_v is not None:
                    gradient_v[part] = part_v
                if gradient_g is not None:
                    gradient_g[part] = part_g
        return gradient @ prototypes if of_rows else None, gradient_v, gradient_g
