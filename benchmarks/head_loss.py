"""The prototypes layer (256 features to 65,536 logits, weight-normed) with the loss, forward and backward.

Memory is what it takes beyond features, parameters and center; the gradients of weights and features are among it, and
the product that torch's weight norm keeps.
As for the loss alone, with two allocators on a CPU.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import baseline
from benchmarks.loss import NUM_VIEWS, LightlyLoss, OurLoss, PlainLoss, compare_losses
from benchmarks.options import Options
from dino.model import WeightNormLinear
from dino.runtime import Precision, reuse_freed_memory

BOTTLENECK_DIM = 256


def measure(options: Options) -> list[dict[str, Any]]:
    out_dim, batch = (256, 2) if options.quick else (65536, 64)
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("baseline", "plain", {}),
        ("lightly", "lightly", {}),
        ("ours fused", "ours", {"implementation": "fused"}),
        ("ours sliced", "ours", {"implementation": "sliced"}),
    ]
    sizes = {"fp32": 4, "bf16": 2}
    return [
        one
        for precision, size in sizes.items()
        for one in compare_losses(
            "benchmarks.head_loss",
            kinds,
            options,
            out_dim=out_dim,
            batch=batch,
            bytes_of_logit=size,
            precision=precision,
        )
    ]


class HeadLossWork:
    """One forward and backward pass through `layer`; the answer is the first loss."""

    def __init__(
        self,
        loss: Any,
        make_layer: Callable[[], nn.Module],
        batch: int,
        precision: str,
        device: torch.device,
        *,
        loss_in_autocast: bool,
        reuse: bool,
    ) -> None:
        if reuse:
            reuse_freed_memory()
        generator = torch.Generator().manual_seed(0)
        self.loss, self.autocast = loss, Precision(precision, device).autocast
        self.autocast_of_loss = self.autocast if loss_in_autocast else contextlib.nullcontext
        rows = torch.randn((NUM_VIEWS + 2) * batch, BOTTLENECK_DIM, generator=generator)
        rows = F.normalize(rows, dim=-1).to(device)
        self.student, self.teacher = rows[: NUM_VIEWS * batch].requires_grad_(), rows[NUM_VIEWS * batch :]
        self.layer, self.teacher_layer = make_layer().to(device), make_layer().to(device)
        weight = torch.randn(self.layer.weight_v.shape, generator=generator)
        for layer in (self.layer, self.teacher_layer):
            layer.weight_v.data.copy_(weight)
        self.teacher_layer.requires_grad_(False)
        self.first: Tensor | None = None

    def __call__(self) -> None:
        self.layer.weight_v.grad = self.student.grad = None
        with self.autocast():
            with torch.no_grad():
                teacher = self.teacher_layer(self.teacher)
            student = self.layer(self.student)
        with self.autocast_of_loss():
            loss = self.loss(student, teacher)
        loss.backward()
        self.loss.update()
        if self.first is None:
            self.first = loss.detach()

    def answer(self) -> float:
        assert self.first is not None
        return float(self.first)


def plain(device: torch.device, out_dim: int, batch: int, precision: str, reuse: bool = False) -> HeadLossWork:
    return _as_users_do(PlainLoss(out_dim, device), out_dim, batch, precision, device, reuse)


def lightly(device: torch.device, out_dim: int, batch: int, precision: str, reuse: bool = False) -> HeadLossWork:
    return _as_users_do(LightlyLoss(out_dim, batch, device), out_dim, batch, precision, device, reuse)


def ours(
    device: torch.device, out_dim: int, batch: int, precision: str, implementation: str, reuse: bool = False
) -> HeadLossWork:
    def make_layer() -> nn.Module:
        return WeightNormLinear(BOTTLENECK_DIM, out_dim, learn_gain=False)

    loss = OurLoss(out_dim, implementation, device)
    return HeadLossWork(loss, make_layer, batch, precision, device, loss_in_autocast=False, reuse=reuse)


def _as_users_do(
    loss: Any, out_dim: int, batch: int, precision: str, device: torch.device, reuse: bool
) -> HeadLossWork:
    """torch's weight norm, and autocast around the loss too."""

    def make_layer() -> nn.Module:
        layer = baseline.prototypes_layer(BOTTLENECK_DIM, out_dim)
        del layer.weight  # the product; every forward pass makes it, and leaves it
        return layer

    return HeadLossWork(loss, make_layer, batch, precision, device, loss_in_autocast=True, reuse=reuse)
