"""The loss of given logits, forward and backward; fp32. Memory is what it takes beyond the logits themselves.

Of that, the gradient of the student's logits is the result: as large as they are. On a CPU our runs tell the allocator
to reuse freed memory, and so does ours here; `baseline, memory reused` shows what that alone brings.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks import baseline
from benchmarks.harness import Contender, Unavailable, compare
from benchmarks.options import Options
from benchmarks.training_steps import as_in_a_run
from dino.config import build, compose
from dino.loss import DINOLoss

TEACHER_TEMP = 0.04
NUM_VIEWS = 10


def measure(options: Options) -> list[dict[str, Any]]:
    out_dim, batches = (256, [2]) if options.quick else (65536, [64, 16])
    return [
        compare(
            f"{out_dim:,} prototypes, {NUM_VIEWS} views, batch {batch}",
            [
                Contender(name, f"benchmarks.loss:{make}", {"out_dim": out_dim, "batch": batch, **settings})
                for name, make, settings in (
                    ("baseline", "plain", {}),
                    ("baseline, memory reused", "plain", {"reuse": True}),
                    ("lightly", "lightly", {}),
                    ("ours plain", "ours", {"implementation": "plain"}),
                    ("ours fused", "ours", {"implementation": "fused"}),
                )
            ],
            options.sampling(rounds=9),
            memory="extra",
            facts={"student_logits_mib": NUM_VIEWS * batch * out_dim * 4 / 2**20},
        )
        for batch in batches
    ]


class LossWork:
    """Forward and backward of `loss(student, teacher)`, then what it keeps for later; the answer is the first value."""

    def __init__(self, loss: Any, out_dim: int, batch: int, device: torch.device) -> None:
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
    if reuse:
        as_in_a_run(device)
    return LossWork(PlainLoss(out_dim, device), out_dim, batch, device)


def lightly(device: torch.device, out_dim: int, batch: int) -> LossWork:
    return LossWork(LightlyLoss(out_dim, batch, device), out_dim, batch, device)


def ours(device: torch.device, out_dim: int, batch: int, implementation: str) -> LossWork:
    return LossWork(OurLoss(out_dim, implementation, device), out_dim, batch, device)


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
        as_in_a_run(device)
        settings = [f"head.out_dim={out_dim}", f"loss.implementation={implementation}", "loss.koleo_weight=0"]
        self.loss: DINOLoss = build(compose(settings), "loss").to(device)

    def __call__(self, student: Any, teacher: Any) -> Tensor:
        self.terms = self.loss(student, teacher, 2, TEACHER_TEMP)
        return self.terms.total

    def update(self) -> None:
        self.loss.observe(self.terms)
        self.loss.update(progress=0.0)
