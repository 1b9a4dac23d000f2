"""One optimizer step of DINO: the algorithm (paper, Algorithm 1; original: main_dino.py, train_one_epoch).

Shapes: B images in a micro-batch, G global views, L local views, V = G + L, K prototypes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dino.augmentation import ViewBatch
from dino.loss import DINOLoss, LossTerms
from dino.model import StudentTeacher
from dino.optimizer import EMA, ClipMode, cancel_last_layer_gradients, clip_gradients
from dino.run import NonFiniteError
from dino.runtime import Precision
from dino.schedule import Schedule


@dataclass(frozen=True)
class Schedules:
    """The four quantities that move during training, each a function of the step."""

    lr: Schedule
    weight_decay: Schedule
    teacher_momentum: Schedule
    teacher_temp: Schedule

    def __call__(self, step: int) -> dict[str, float]:
        return {
            "lr": self.lr(step),
            "weight_decay": self.weight_decay(step),
            "teacher_momentum": self.teacher_momentum(step),
            "teacher_temp": self.teacher_temp(step),
        }


@dataclass(frozen=True)
class StepOutput:
    """What one step leaves for the log; logits and terms are those of the last micro-batch."""

    student_logits: Tensor  # [V*B, K]
    terms: LossTerms
    grad_norm: Tensor  # 0-d, before clipping
    scheduled: dict[str, float]


@dataclass(kw_only=True)
class TrainStep:
    """One optimizer step over a window of micro-batches; owns everything that a step changes.

    Center, EMA, schedules and clipping happen once a step, so that n micro-batches of B equal one batch of n*B.
    """

    model: StudentTeacher
    loss: DINOLoss
    optimizer: torch.optim.Optimizer
    ema: EMA
    schedules: Schedules
    precision: Precision
    clip_mode: ClipMode
    clip_norm: float | None
    freeze_last_layer_steps: int
    total_steps: int  # that the schedules span
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        # Disabled, it hands everything through (original: main_dino.py, fp16_scaler).
        self.scaler = torch.amp.GradScaler(self.precision.device.type, enabled=self.precision.name == "fp16")

    def __call__(self, step: int, window: Sequence[ViewBatch]) -> StepOutput:
        """Step number `step` (from 0) on float views of this device.

        Raises:
            NonFiniteError: if the loss is NaN or infinite; student, teacher and center are then as before.
        """
        student, teacher = self.model.student, self.model.teacher
        scheduled = self.schedules(step)
        self._set_optimizer(scheduled)
        self.optimizer.zero_grad(set_to_none=True)
        for views in window:
            with self.precision.autocast():
                teacher_logits = self.model.teacher_forward(views.global_views)
                student_logits, features = self.model.student_forward(views.global_views, views.local_views)
            num_global_views = len(views.global_views)
            terms = self.loss(student_logits, teacher_logits, num_global_views, scheduled["teacher_temp"], features)
            self._check_finite(step, terms.total)
            self.scaler.scale(terms.total / len(window)).backward()
            self.loss.observe(teacher_logits, terms)  # center and weights move after the step

        self.scaler.unscale_(self.optimizer)
        grad_norm = clip_gradients(student.parameters(), self.clip_norm, self.clip_mode)
        if step < self.freeze_last_layer_steps:
            cancel_last_layer_gradients(student)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update(student, teacher, scheduled["teacher_momentum"])
        self.loss.update(progress=step / self.total_steps)
        return StepOutput(student_logits.detach(), terms, grad_norm, scheduled)

    def _set_optimizer(self, scheduled: dict[str, float]) -> None:
        """The learning rate for all, the weight decay for the first group only, as the original."""
        regularised, *_ = self.optimizer.param_groups
        regularised["weight_decay"] = scheduled["weight_decay"]
        for group in self.optimizer.param_groups:
            group["lr"] = scheduled["lr"]

    def _check_finite(self, step: int, total: Tensor) -> None:
        if not torch.isfinite(total):
            self.optimizer.zero_grad(set_to_none=True)
            self.loss.forget()
            raise NonFiniteError(f"the loss of step {step + 1} is {total.item()}; nothing was updated by it")
