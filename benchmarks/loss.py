"""The loss of given logits, forward and backward; fp32. Memory is what it takes beyond the logits themselves.

Of that, the gradient of the student's logits is the result: as large as they are. On a CPU each comparison is made
twice: with glibc's allocator as it is, and told to reuse freed memory, as it is in our runs (`reuse_freed_memory`).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import baseline
from benchmarks.harness import Contender, Unavailable, compare
from benchmarks.options import Options
from dino.config import build, compose
from dino.loss import DINOLoss
from dino.runtime import choose_device, reuse_freed_memory

TEACHER_TEMP = 0.04
NUM_VIEWS = 10


def measure(options: Options) -> list[dict[str, Any]]:
    out_dim, batches = (256, [2]) if options.quick else (65536, [64, 16])
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("baseline", "plain", {}),
        ("lightly", "lightly", {}),
        ("ours plain", "ours", {"implementation": "plain"}),
        ("ours fused", "ours", {"implementation": "fused"}),
    ]
    return [
        one
        for batch in batches
        for one in compare_losses("benchmarks.loss", kinds, options, out_dim=out_dim, batch=batch, bytes_of_logit=4)
    ]


def compare_losses(
    module: str,
    kinds: list[tuple[str, str, dict[str, Any]]],
    options: Options,
    *,
    out_dim: int,
    batch: int,
    bytes_of_logit: int,
    **settings: Any,
) -> Iterator[dict[str, Any]]:
    """Contenders of `kinds` (name, function of `module`, its settings) with each allocator that there is."""
    allocators = [(False, "default allocator"), (True, "freed memory reused")]
    if choose_device(options.device).type == "cuda":
        allocators = [(False, "")]
    for reuse, allocator in allocators:
        described = [f"{out_dim:,} prototypes", f"{NUM_VIEWS} views", f"batch {batch}", *settings.values(), allocator]
        shared = {"out_dim": out_dim, "batch": batch, "reuse": reuse, **settings}
        yield compare(
            ", ".join(word for word in described if word),
            [Contender(name, f"{module}:{make}", {**shared, **own}) for name, make, own in kinds],
            options.sampling(rounds=15),  # enough to see the cores near and far
            memory="extra",
            facts={"student_logits_mib": NUM_VIEWS * batch * out_dim * bytes_of_logit / 2**20},
        )


class LossWork:
    """Forward and backward of `loss(student, teacher)`, then what it keeps for later; the answer is the first value."""

    def __init__(self, loss: Any, out_dim: int, batch: int, device: torch.device, reuse: bool) -> None:
        if reuse:
            reuse_freed_memory()
        generator = torch.Generator().manual_seed(0)
        self.loss = loss
        self.first: Tensor | None = None
        rows = torch.rand(((NUM_VIEWS + 2) * batch, out_dim), generator=generator).mul_(2).sub_(1).to(device)
        self.student, self.teacher = rows[: NUM_VIEWS * batch].requires_grad_(), rows[NUM_VIEWS * batch :]

    def __call__(self) -> None:
        self.student.grad = None
        loss = self.loss(self.student, self.teacher)
        loss.backward()
        self.loss.update()
        if self.first is None:
            self.first = loss.detach()

    def answer(self) -> float:
        assert self.first is not None
        return float(self.first)


def plain(device: torch.device, out_dim: int, batch: int, reuse: bool = False) -> LossWork:
    return LossWork(PlainLoss(out_dim, device), out_dim, batch, device, reuse)


def lightly(device: torch.device, out_dim: int, batch: int, reuse: bool = False) -> LossWork:
    return LossWork(LightlyLoss(out_dim, batch, device), out_dim, batch, device, reuse)


def ours(device: torch.device, out_dim: int, batch: int, implementation: str, reuse: bool = False) -> LossWork:
    return LossWork(OurLoss(out_dim, implementation, device), out_dim, batch, device, reuse)


class PlainLoss:
    """The baseline's, which moves its center as it is called."""

    def __init__(self, out_dim: int, device: torch.device) -> None:
        self.loss = baseline.DINOLoss(out_dim, NUM_VIEWS).to(device)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        loss: Tensor = self.loss(student, teacher, TEACHER_TEMP)
        return loss

    def update(self) -> None:
        pass


class LightlyLoss:
    """lightly's, likewise."""

    def __init__(self, out_dim: int, batch: int, device: torch.device) -> None:
        try:
            from lightly.loss import DINOLoss as Loss
        except ImportError as error:
            raise Unavailable("lightly is not installed: pip install -e .[bench]") from error
        self.loss, self.batch = Loss(out_dim).to(device), batch

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        views = list(teacher.split(self.batch)), list(student.split(self.batch))
        loss: Tensor = self.loss(*views, teacher_temp=TEACHER_TEMP)
        return loss

    def update(self) -> None:
        pass


class OurLoss:
    """Ours, of logits or of what they are made of; the center moves after the backward pass, as it does in a step."""

    def __init__(self, out_dim: int, implementation: str, device: torch.device) -> None:
        settings = [f"head.out_dim={out_dim}", f"loss.implementation={implementation}", "loss.koleo_weight=0"]
        self.loss: DINOLoss = build(compose(settings), "loss").to(device)

    def __call__(self, student: Any, teacher: Any) -> Tensor:
        self.terms = self.loss(student, teacher, 2, TEACHER_TEMP)
        return self.terms.total

    def update(self) -> None:
        self.loss.observe(self.terms)
        self.loss.update(progress=0.0)
