"""Products with weight-normed prototypes: what the head ends in, and what the loss may take apart.

Shapes: N rows, K prototypes, b bottleneck.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dino.linear import product

SLICE: Final = 2048  # prototypes that are handled at a time: few enough to stay in a cache, enough for a matrix product


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


def logits_at_a_time(device: torch.device) -> int:
    """As few as stay in the cache of a CPU's core, where that is the device: 1 MB in float32."""
    return 2**18 if device.type == "cpu" else 2**26


def slices(number: int, size: int = SLICE) -> Iterator[slice]:
    """0..number in parts of `size`."""
    return (slice(start, min(start + size, number)) for start in range(0, number, size))


def scaled_prototypes(directions: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`[K, b]` in `dtype`: directions [K, b] times scales [K], without a copy in the parameters' type."""
    prototypes = torch.empty(directions.shape, dtype=dtype, device=directions.device)
    for part in slices(len(directions)):
        prototypes[part] = directions[part] * scales[part, None]
    return prototypes


@dataclass
class DirectionGradients:
    """From gradients of the prototypes w = g v / |v| to those of directions v and gains g, some prototypes at a time:
    dg = dw . v / |v|, dv = g / |v| (dw - dg v / |v|)."""

    directions: Tensor  # [K, b]
    gains: Tensor  # [K, 1]
    lengths: Tensor  # [K], of the directions
    wanted: tuple[bool, bool]  # those of directions, of gains

    def __post_init__(self) -> None:
        of_directions, of_gains = self.wanted
        self.of_directions = torch.empty_like(self.directions) if of_directions else None
        self.of_gains = torch.empty_like(self.gains) if of_gains else None

    def put(self, part: slice, logits_gradient: Tensor, rows: Tensor) -> None:
        """Of the prototypes `part`, from the gradient [N, k] of their logits, in the type of the rows [N, b]."""
        if not any(self.wanted):
            return
        directions, lengths = self.directions[part], self.lengths[part, None]
        prototypes = (logits_gradient.T @ rows).to(directions.dtype)  # [k, b]
        gains = torch.linalg.vecdot(prototypes, directions)[:, None] / lengths
        if self.of_gains is not None:
            self.of_gains[part] = gains
        if self.of_directions is not None:
            across = prototypes.addcmul_(directions, gains / lengths, value=-1)
            torch.mul(across, self.gains[part] / lengths, out=self.of_directions[part])


class _Logits(torch.autograd.Function):
    """rows [N, b], directions [K, b], gains [K, 1] -> logits [N, K] in the type of the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, directions: Tensor, gains: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(directions, dim=1)
        prototypes = scaled_prototypes(directions, gains[:, 0] / lengths, rows.dtype)
        ctx.save_for_backward(rows, directions, gains, lengths, prototypes)
        return product(rows, prototypes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, directions, gains, lengths, prototypes = ctx.saved_tensors
        of_rows, *of_parameters = ctx.needs_input_grad
        found = DirectionGradients(directions, gains, lengths, tuple(of_parameters))
        for part in slices(len(directions)):
            found.put(part, gradient[:, part], rows)
        return gradient @ prototypes if of_rows else None, found.of_directions, found.of_gains
