"""What follows the backward pass, for ViT-S/16 and a head of 65,536 prototypes: clipping, AdamW, moving average."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from benchmarks import baseline
from benchmarks.harness import Contender, compare
from benchmarks.options import Options
from benchmarks.training_steps import LR, TEACHER_MOMENTUM, WEIGHT_DECAY, OurStep, baseline_training, compose_step
from dino.optimizer import clip_gradients

PARTS = {"clip": "Clipping of each gradient", "adamw": "AdamW", "ema": "Moving average", "all": "All three"}


def measure(options: Options) -> list[dict[str, Any]]:
    size: dict[str, Any] = {"backbone": "vit_s16", "out_dim": 65536}
    if options.quick:
        size = {"backbone": "vit_t16", "out_dim": 256, "depth": 1}
    return [
        compare(
            title,
            [
                Contender(name, f"benchmarks.update:{make}", {"part": part, "size": size})
                for name, make in (("baseline", "PlainUpdate"), ("ours", "OurUpdate"))
            ],
            options.sampling(rounds=9),
            memory="none",
        )
        for part, title in PARTS.items()
    ]


class Update(ABC):
    """One part, or all; the answer is the sum of the magnitudes of all parameters and gradients afterwards."""

    def __init__(self, part: str, size: dict[str, Any], device: torch.device) -> None:
        self.student, self.teacher = self.make(compose_step(**size, overrides=["trainer.precision=fp32"]), device)
        generator = torch.Generator().manual_seed(0)
        for parameter in self._trained():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
        # The smallest norm, so that every gradient is clipped; a little lower each time, so that it stays so.
        self.clip_norm = min(float(torch.linalg.vector_norm(gradient)) for gradient in self._gradients())
        self.parts = [self.clip, self.adamw, self.ema] if part == "all" else [getattr(self, part)]

    def __call__(self) -> None:
        self.clip_norm *= 0.999
        for part in self.parts:
            part()

    @abstractmethod
    def make(self, config: DictConfig, device: torch.device) -> tuple[nn.Module, nn.Module]:
        """Student and teacher, from the same weights for all, and what changes them."""

    @abstractmethod
    def clip(self) -> None: ...

    @abstractmethod
    def adamw(self) -> None: ...

    @abstractmethod
    def ema(self) -> None: ...

    def answer(self) -> float:
        """After one repetition more than were made; contenders are asked after equally many."""
        self()
        return float(sum(tensor.abs().sum(dtype=torch.float64) for tensor in self._tensors()))

    def _trained(self) -> list[nn.Parameter]:
        """In an order that all have."""
        return [parameter for _, parameter in sorted(self.student.named_parameters()) if parameter.requires_grad]

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._trained() if parameter.grad is not None]

    def _tensors(self) -> list[Tensor]:
        networks = (*self.student.parameters(), *self.teacher.parameters())
        return [*(parameter.detach() for parameter in networks), *self._gradients()]


class PlainUpdate(Update):
    """Loops over the parameters."""

    def make(self, config: DictConfig, device: torch.device) -> tuple[nn.Module, nn.Module]:
        made = baseline_training(config, "fp32", device)
        self.optimizer = torch.optim.AdamW(baseline.parameter_groups(made.student), lr=LR, weight_decay=WEIGHT_DECAY)
        return made.student, made.teacher

    def clip(self) -> None:
        baseline.clip_gradients(self.student, self.clip_norm)

    def adamw(self) -> None:
        self.optimizer.step()

    def ema(self) -> None:
        baseline.update_teacher(self.student, self.teacher, TEACHER_MOMENTUM)


class OurUpdate(Update):
    """What the training step calls: clipping finds whether the gradients are finite, the others do nothing if not.

    These networks have no buffers that would have to be restored then.
    """

    def make(self, config: DictConfig, device: torch.device) -> tuple[nn.Module, nn.Module]:
        self.step = OurStep(config, device).train_step
        self.step._set_optimizer({"lr": LR, "weight_decay": WEIGHT_DECAY})
        self.skipped = torch.zeros((), dtype=torch.bool, device=device)
        return self.step.model.student, self.step.model.teacher

    def clip(self) -> None:
        norm, _ = clip_gradients(self.student.parameters(), self.clip_norm)
        self.skipped = ~torch.isfinite(norm)

    def adamw(self) -> None:
        self.step._step_optimizer(self.skipped)

    def ema(self) -> None:
        self.step.ema.update(self.student, self.teacher, TEACHER_MOMENTUM, self.skipped)
