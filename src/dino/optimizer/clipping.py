"""Clipping of gradients without waiting for the device.

Shapes: P parameters that have a gradient.
"""

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

from dino.ranks import sum_over_ranks

ClipMode = Literal["per_tensor", "global_norm"]


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[Tensor], max_norm: float | None, mode: ClipMode = "per_tensor", *, are_parts: bool = False
) -> tuple[Tensor, Tensor]:
    """Scales gradients down in place so that no norm exceeds `max_norm`.

    Returns the norm of all together, 0-d, and of each, [P].

    `per_tensor` looks at each parameter's gradient by itself (utils.py, clip_gradients), `global_norm` at all of them
    as one vector. A norm n above `max_norm` is scaled by max_norm / (n + 1e-6), anything else is left alone. The norms
    returned are those before clipping, also where `max_norm` of 0 or None turns clipping off. Unlike the original
    this never reads a norm on the host, so a GPU does not have to be waited for.

    Args:
        are_parts: each rank has a part of every gradient; norms are those of the whole, the same on all ranks.

    Raises:
        ValueError: for a negative `max_norm` or an unknown mode.
    """
    if mode not in get_args(ClipMode):
        raise ValueError(f"trainer.clip_mode={mode}: use {' or '.join(get_args(ClipMode))}")
    if max_norm is not None and not max_norm >= 0:
        raise ValueError(f"trainer.clip_norm={max_norm}: use a number above 0, or 0 or null for no clipping")
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(()), torch.zeros(0)
    norms = torch.stack(torch._foreach_norm(gradients))  # [P]
    if are_parts:
        norms = sum_over_ranks(norms.square()).sqrt()
    total: Tensor = torch.linalg.vector_norm(norms)
    if not max_norm:
        return total, norms
    if mode == "global_norm":
        torch._foreach_mul_(gradients, _coefficient(total, max_norm))
    else:
        torch._foreach_mul_(gradients, list(_coefficient(norms, max_norm).unbind()))
    return total, norms


def _coefficient(norm: Tensor, max_norm: float) -> Tensor:
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)
