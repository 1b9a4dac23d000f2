"""One optimizer step of DINO: the algorithm (paper, Algorithm 1; original: main_dino.py, train_one_epoch).

Shapes: B images in a micro-batch, G global views, L local views, V = G + L, K prototypes, P trained parameters.
"""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dino.augmentation import ViewBatch
from dino.loss import DINOLoss, LossTerms
from dino.model import Projection, StudentTeacher
from dino.monitor import OutputStatistics, StepTimer
from dino.optimizer import EMA, ClipMode, cancel_last_layer_gradients, clip_gradients
from dino.ranks import max_over_ranks
from dino.runtime import Precision
from dino.schedule import Schedule

if TYPE_CHECKING:
    from dino.training.sharding import Shards


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
    """What one step leaves for the log; outputs and terms are those of the last micro-batch."""

    outputs: OutputStatistics | None  # where the step was told to observe them
    terms: LossTerms
    loss: Tensor  # 0-d, mean over the micro-batches of this process
    grad_norm: Tensor  # 0-d, before clipping
    grad_norms: Tensor  # [P], the same for each parameter
    grad_names: Sequence[str]  # P names
    skipped: Tensor  # 0-d, bool: a gradient was not finite, and nothing was updated
    broken: Tensor  # 0-d, bool: skipped, and not because fp16 is still looking for its scale
    scheduled: dict[str, float]


@dataclass(kw_only=True)
class TrainStep:
    """One optimizer step over a window of micro-batches; owns everything that a step changes.

    Center, EMA, schedules and clipping happen once a step, so that n micro-batches of B equal one batch of n*B (but for
    batch norm, which sees one at a time).

    A loss or gradient that is not finite changes nothing: student, teacher, center and optimizer stay as they were.
    The host does not wait to learn of it: the norm of the gradients says so on the device, a fused optimizer takes
    that as its `found_inf`, and every other update is chosen by `torch.where`. (Only an optimizer that does not take
    `found_inf` makes the host wait.)

    Under several ranks `student` is `model.student` inside DistributedDataParallel, or the networks are divided among
    the ranks and `shards` are the parts of this one; everything said of a batch holds for that of all ranks together.
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
    freeze_backbone_steps: int = 0
    student: nn.Module | None = None
    shards: "Shards | None" = None
    scaler: torch.amp.GradScaler = field(init=False)
    timer: StepTimer = field(init=False)

    def __post_init__(self) -> None:
        # Disabled, it hands everything through (original: main_dino.py, fp16_scaler).
        self.scaler = torch.amp.GradScaler(self.precision.device.type, enabled=self.precision.name == "fp16")
        self.student = self.model.student if self.student is None else self.student
        self.timer = StepTimer(self.precision.device)
        self._buffers = list(self.model.buffers())
        self._updated = self.shards or self.model
        self._parameters = list(self._updated.student.named_parameters())
        self._trained = [parameter for _, parameter in self._parameters]

    def __call__(self, step: int, window: Sequence[ViewBatch], *, observe: bool = False) -> StepOutput:
        """Step number `step` (from 0) on float views of this device; `observe`: with statistics of the outputs."""
        scheduled = self.schedules(step)
        self.timer.begin()
        self._set_optimizer(scheduled)
        self.optimizer.zero_grad(set_to_none=True)
        buffers = [buffer.clone() for buffer in self._buffers]
        losses = []
        for position, views in enumerate(window, start=1):
            with self._ranks_sum_gradients(position == len(window)):
                student, teacher, terms = self._forward(views, scheduled["teacher_temp"])
                if position == len(window):
                    self.loss.send()
                self.timer.mark("forward")
                losses.append(terms.total.detach())
                scaled: Tensor = self.scaler.scale(_nan_if_not_finite(terms.total) / len(window))
                with self.precision.products():
                    torch.autograd.backward(scaled)
                self.timer.mark("backward")

        outputs = (
            self._observed(student, teacher, scheduled["teacher_temp"], len(views.global_views)) if observe else None
        )
        if self.shards is not None:
            self.shards.take_gradients()
        if step < self.freeze_backbone_steps:
            self._cancel_backbone_gradients()
        self.scaler.unscale_(self.optimizer)
        grad_names = [name for name, parameter in self._parameters if parameter.grad is not None]
        grad_norm, grad_norms = clip_gradients(
            self._trained, self.clip_norm, self.clip_mode, are_parts=self.shards is not None
        )
        skipped = ~torch.isfinite(grad_norm)
        loss = torch.stack(losses).mean()
        broken = skipped & self._scale_is_not_to_blame(loss)
        if step < self.freeze_last_layer_steps:
            cancel_last_layer_gradients(self._parameters)
        self._step_optimizer(skipped)
        self._restore_buffers(buffers, skipped)
        momentum = scheduled["teacher_momentum"]
        self.ema.update(self._updated.student, self._updated.teacher, momentum, skipped)
        self.loss.update(progress=step / self.total_steps, skipped=skipped)
        self.timer.mark("update")
        return StepOutput(outputs, terms, loss, grad_norm, grad_norms, grad_names, skipped, broken, scheduled)

    def _forward(self, views: ViewBatch, teacher_temp: float) -> tuple[Projection, Projection, LossTerms]:
        """Student, teacher and the loss of one micro-batch, which center and weights take note of."""
        assert self.student is not None
        with self.precision.autocast():
            teacher = self.model.teacher_forward(views.global_views)
            student, features = self.student(views.global_views, views.local_views)
        terms: LossTerms = self.loss(student, teacher, len(views.global_views), teacher_temp, features)
        self.loss.observe(terms)  # center and weights move after the step
        return student, teacher, terms

    @torch.no_grad()
    def _observed(
        self, student: Projection, teacher: Projection, teacher_temp: float, num_global_views: int
    ) -> OutputStatistics:
        """Of outputs whose logits are made once more: after the backward pass, which has given its memory back, and
        before the parameters change."""
        if self.shards is not None:
            self.shards.gather_prototypes()
        targets = self.loss.centering.targets(teacher.logits(), teacher_temp)
        views = student.logits().chunk(num_global_views * len(student.rows) // len(targets))
        return OutputStatistics.of(views, targets, self.loss.student_temp, num_global_views)

    def whole_model(self) -> StudentTeacher:
        """Both networks, whole on every rank: `model`, or a copy where that is divided. All ranks call it."""
        return self.model if self.shards is None else self.shards.whole_model()

    def student_with_gradients(self) -> nn.Module:
        """A module of the student's names whose parameters have the gradients of the last step. All ranks call it."""
        return self.model.student if self.shards is None else self.shards.student_with_gradients()

    def _ranks_sum_gradients(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients of the ranks are averaged once a step, in the backward pass of its last micro-batch."""
        if self.shards is not None:
            self.shards.accumulate(last)
        if last or not isinstance(self.student, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.student.no_sync()

    def _cancel_backbone_gradients(self) -> None:
        """Only the head learns: parameters without a gradient get no update and no weight decay."""
        for name, parameter in self._parameters:
            if name.startswith("backbone."):
                parameter.grad = None

    def _set_optimizer(self, scheduled: dict[str, float]) -> None:
        """The learning rate for all, the weight decay for the first group only, as the original."""
        regularised, *_ = self.optimizer.param_groups
        regularised["weight_decay"] = scheduled["weight_decay"]
        for group in self.optimizer.param_groups:
            group["lr"] = scheduled["lr"]

    def _step_optimizer(self, skipped: Tensor) -> None:
        optimizer: Any = self.optimizer
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)  # looks at the gradients by itself
            self.scaler.update()
        elif getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale, optimizer.found_inf = None, skipped.float()
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
        elif not skipped:
            optimizer.step()

    def _scale_is_not_to_blame(self, loss: Tensor) -> Tensor:
        """0-d, bool: false where an infinite gradient only means that the scale of fp16 is still too large."""
        if not self.scaler.is_enabled():
            return torch.ones_like(loss, dtype=torch.bool)
        lost = max_over_ranks((~torch.isfinite(loss)).float()).bool()
        return lost | (self.scaler.scale(torch.ones_like(loss)) <= 1)

    def _restore_buffers(self, before: Sequence[Tensor], skipped: Tensor) -> None:
        """Batch norm has taken in a bad batch when its loss is known."""
        for buffer, old in zip(self._buffers, before, strict=True):
            buffer.copy_(torch.where(skipped, old, buffer))


def _nan_if_not_finite(loss: Tensor) -> Tensor:
    """`loss` itself, or one whose gradients are all NaN: then a look at the gradients is enough, on every rank."""
    return loss * torch.where(torch.isfinite(loss), 1.0, torch.nan).to(loss)
