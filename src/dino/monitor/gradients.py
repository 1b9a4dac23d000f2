"""Gradients of the student by groups of layers.

Shapes: P parameters with a gradient, R groups.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

BLOCKS = ("blocks", "layers", "features", "stages")  # lists whose items are groups of their own


def gradient_norms(names: Sequence[str], norms: Tensor) -> dict[str, Tensor]:
    """`grad/<group>/norm`, each 0-d, before clipping, of each group in the order of the network.

    Args:
        names: of the P parameters that had a gradient when it was clipped.
        norms: [P], before clipping.
    """
    groups, places = _groups_of(tuple(names), norms.device)
    squares = norms.new_zeros(len(groups)).index_add_(0, places, norms.square())
    return {f"grad/{group}/norm": norm for group, norm in zip(groups, squares.sqrt().unbind(), strict=True)}


def gradient_distributions(student: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """`grad/<group>/mean`, `std`, `min` and `max`, each 0-d, of the gradients as the optimizer has seen them.

    The same of all together is `train/grad_mean` and so on.
    A frozen last layer has none.

    Args:
        student: whose parameters still have their gradients.
        names: of the P parameters that had one when it was clipped.
    """
    parameters = dict(student.named_parameters())
    found = {name: gradient for name in names if (gradient := parameters[name].grad) is not None}
    if not found:
        return {}
    gradients = list(found.values())
    device = gradients[0].device
    groups, places = _groups_of(tuple(found), device)
    count = _sizes(tuple(found), tuple(gradient.numel() for gradient in gradients), device)
    ends = [gradient.aminmax() for gradient in gradients]

    def over_groups(values: Sequence[Tensor], how: Literal["sum", "amin", "amax"]) -> Tensor:
        """One 0-d value for each parameter to [R]."""
        stacked = torch.stack(list(values)).double()
        return torch.zeros_like(count).scatter_reduce_(0, places, stacked, how, include_self=False)

    mean = over_groups([gradient.sum() for gradient in gradients], "sum") / count
    squares = over_groups([norm.square() for norm in torch._foreach_norm(gradients)], "sum")
    figures = {
        "mean": mean,
        "std": (squares / count - mean.square()).clamp(min=0).sqrt(),
        "min": over_groups([end.min for end in ends], "amin"),
        "max": over_groups([end.max for end in ends], "amax"),
    }
    whole_mean = (mean * count).sum() / count.sum()
    whole = {
        "mean": whole_mean,
        "std": (squares.sum() / count.sum() - whole_mean.square()).clamp(min=0).sqrt(),
        "min": figures["min"].min(),
        "max": figures["max"].max(),
    }
    return {f"train/grad_{kind}": value for kind, value in whole.items()} | {
        f"grad/{group}/{kind}": value
        for kind, values in figures.items()
        for group, value in zip(groups, values.unbind(), strict=True)
    }


def group_of(name: str) -> str:
    """The group of a parameter: `backbone.blocks.3.attn.qkv.weight` belongs to `backbone.blocks.3`, parts without a
    list of blocks to the module below backbone or head (`head.mlp`, `backbone.pos_embed`, `backbone.model.layer1`)."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return ".".join(parts[:2])
    return ".".join(parts[: number + 1] if parts[number - 1] in BLOCKS else parts[:number])


@lru_cache(maxsize=4)
def _groups_of(names: tuple[str, ...], device: torch.device) -> tuple[list[str], Tensor]:
    """The groups, and the place of each parameter's among them, [P]; kept, so that it crosses to the device once."""
    groups = list(dict.fromkeys(map(group_of, names)))
    return groups, torch.tensor([groups.index(group_of(name)) for name in names], device=device)


@lru_cache(maxsize=4)
def _sizes(names: tuple[str, ...], sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """How many values each group has, [R] in float64."""
    groups, places = _groups_of(names, device)
    count = torch.zeros(len(groups), dtype=torch.float64, device=device)
    return count.index_add_(0, places, torch.tensor(sizes, dtype=torch.float64, device=device))
