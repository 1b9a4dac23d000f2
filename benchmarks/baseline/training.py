"""One training step, in the original's order of operations.

Shapes: B images, V views, C channels, H x W pixels.
"""

import contextlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baseline.loss import DINOLoss, koleo_loss
from benchmarks.baseline.networks import MultiCrop


class Training:
    """Student, teacher, loss and AdamW.

    Args:
        student, teacher: the same network twice, the teacher without drop path; it gets the student's weights.
        loss: its center moves with every step.
        precision: `fp32`, or `bf16`: torch.autocast around the forward passes and the loss.
        clip: largest norm of each parameter's gradient.
        koleo_weight: of a KoLeo term on the student's global views, which some recipes have.
    """

    def __init__(
        self,
        student: MultiCrop,
        teacher: MultiCrop,
        loss: DINOLoss,
        *,
        precision: str = "fp32",
        clip: float = 3.0,
        koleo_weight: float = 0.0,
    ) -> None:
        self.student, self.teacher, self.loss = student, teacher, loss
        self.precision, self.clip, self.koleo_weight = precision, clip, koleo_weight
        teacher.load_state_dict(student.state_dict())
        for parameter in teacher.parameters():
            parameter.requires_grad = False
        self.optimizer = torch.optim.AdamW(parameter_groups(student))

    def __call__(
        self,
        views: Sequence[Tensor],
        *,
        lr: float,
        weight_decay: float,
        teacher_momentum: float,
        teacher_temp: float,
        freeze_last_layer: bool = False,
    ) -> float:
        """V views [B, C, H, W], the two global ones first -> the loss.

        Raises:
            FloatingPointError: for a loss that is not finite.
        """
        for index, group in enumerate(self.optimizer.param_groups):
            group["lr"] = lr
            if index == 0:
                group["weight_decay"] = weight_decay
        with self._autocast(views[0].device.type):
            teacher_logits = self.teacher(views[:2])
            student_logits = self.student(views)
            loss = self.loss(student_logits, teacher_logits, teacher_temp)
            if self.koleo_weight:
                global_features = self.student.features.chunk(len(views))[:2]
                loss = loss + self.koleo_weight * sum(koleo_loss(features) for features in global_features) / 2
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()}")
        self.optimizer.zero_grad()
        loss.backward()
        clip_gradients(self.student, self.clip)
        if freeze_last_layer:
            cancel_last_layer_gradients(self.student)
        self.optimizer.step()
        update_teacher(self.student, self.teacher, teacher_momentum)
        return loss.item()

    def _autocast(self, device: str) -> AbstractContextManager[Any]:
        return torch.autocast(device, torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()


def clip_gradients(model: nn.Module, clip: float) -> list[float]:
    """Scales each gradient whose norm is above `clip`; returns the norms."""
    norms = []
    for parameter in model.parameters():
        if parameter.grad is not None:
            norm = parameter.grad.data.norm(2)
            norms.append(norm.item())
            coefficient = clip / (norm + 1e-6)
            if coefficient < 1:
                parameter.grad.data.mul_(coefficient)
    return norms


def cancel_last_layer_gradients(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "last_layer" in name:
            parameter.grad = None


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    for own, of_student in zip(teacher.parameters(), student.parameters(), strict=True):
        own.data.mul_(momentum).add_((1 - momentum) * of_student.detach().data)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """With weight decay, and without: biases and vectors."""
    regularised, not_regularised = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = name.endswith(".bias") or parameter.ndim == 1
            (not_regularised if plain else regularised).append(parameter)
    return [{"params": regularised}, {"params": not_regularised, "weight_decay": 0.0}]
