"""One batch through student, teacher and loss, with every intermediate in the open: `dino debug loss`.

Shapes: B images in the batch, G global views, L local views, V = G + L, K prototypes.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from dino.augmentation import ViewBatch
from dino.config import build
from dino.dataset import TrainLoader
from dino.loss import DINOLoss, EMACentering, LossTerms
from dino.loss.reference import LossSteps, step_by_step
from dino.loss.weighting import PairsWeighting
from dino.model import MultiCropModel, StudentTeacher
from dino.runtime import choose_device, set_seeds

# Two float32 computations of the same number in a different order.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Row:
    """A tensor in one line."""

    name: str
    shape: tuple[int, ...]
    low: float
    high: float
    mean: float

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Row":
        values = tensor.detach().double()
        return cls(name, tuple(tensor.shape), values.min().item(), values.max().item(), values.mean().item())


@dataclass(frozen=True)
class Check:
    """Something that must hold; `holds` is None where it cannot be told with these settings."""

    name: str
    holds: bool | None
    detail: str


@dataclass(frozen=True)
class LossInspection:
    rows: list[Row]
    checks: list[Check]

    @property
    def sound(self) -> bool:
        return all(check.holds is not False for check in self.checks)


def inspect_loss(config: DictConfig) -> LossInspection:
    """The first batch of the first epoch, in float32, with freshly initialised networks."""
    device = choose_device(config.trainer.device)
    set_seeds(config.seed)
    views, steps_per_epoch = _first_batch(config, device)
    backbone = build(config, "backbone")
    model = StudentTeacher(MultiCropModel(backbone, build(config, "head", in_dim=backbone.embed_dim))).to(device)
    loss: DINOLoss = build(config, "loss").to(device)
    schedule = build(config, "schedule.teacher_temp", epochs=config.trainer.epochs, steps_per_epoch=steps_per_epoch)
    temp = schedule(0)

    teacher_logits = model.teacher_forward(views.global_views)
    student_logits, features = model.student_forward(views.global_views, views.local_views)
    num_global_views = len(views.global_views)
    terms = loss(student_logits, teacher_logits, num_global_views, temp, features)
    centering = loss.centering
    center, center_momentum = torch.zeros_like(teacher_logits[:1]), 0.0
    if isinstance(centering, EMACentering):
        center, center_momentum = centering.center.clone(), centering.momentum
    steps = step_by_step(
        student_logits,
        teacher_logits,
        num_global_views=num_global_views,
        student_temp=loss.student_temp,
        teacher_temp=temp,
        center=center,
        center_momentum=center_momentum,
    )
    terms.total.backward()
    loss.observe(teacher_logits, terms)
    loss.update(progress=0.0)

    rows = [Row.of("global_views", views.global_views)]
    rows += [Row.of("local_views", views.local_views)] if views.local_views is not None else []
    rows += [Row.of("student_features", features), *_rows_of(steps)]
    return LossInspection(
        rows, [*_distribution_checks(steps), *_reference_checks(loss, terms, steps), *_gradients(model)]
    )


def _first_batch(config: DictConfig, device: torch.device) -> tuple[ViewBatch, int]:
    """Float views on the device, and the batches of an epoch."""
    dataset = build(config, "dataset")
    mean, std = dataset.normalization()
    augmentation = build(config, "augmentation", mean=mean, std=std)
    loader = TrainLoader(dataset, augmentation, seed=config.seed)
    batch = next(iter(loader.epoch(0))).to(device)
    return (batch if batch.parameters is None else augmentation.photometric(batch)), loader.num_batches


def _rows_of(steps: LossSteps) -> list[Row]:
    rows: list[Row] = []
    for field in dataclasses.fields(steps):
        value: Any = getattr(steps, field.name)
        if isinstance(value, Tensor):
            rows.append(Row.of(field.name, value))
        elif isinstance(value, list):
            rows += [Row.of(f"{field.name}[{view}]", tensor) for view, tensor in enumerate(value)]
        elif isinstance(value, dict):
            rows += [Row.of(f"{field.name}[{i},{j}]", tensor) for (i, j), tensor in value.items()]
    return rows


def _distribution_checks(steps: LossSteps) -> list[Check]:
    student = [log_probabilities.exp() for log_probabilities in steps.student_log_probabilities]
    checks = []
    for name, views in (("teacher", steps.teacher_probabilities), ("student", student)):
        worst = max((view.sum(dim=-1) - 1).abs().max().item() for view in views)
        checks.append(Check(f"{name}'s probabilities sum to 1", worst < TOLERANCE, f"off by at most {worst:.1e}"))
    return checks


def _reference_checks(loss: DINOLoss, terms: LossTerms, steps: LossSteps) -> list[Check]:
    """The loss that trains against the step-by-step one, which knows EMA centering and equal pairs only."""
    if not isinstance(loss.centering, EMACentering):
        reason = f"the step-by-step loss has no {type(loss.centering).__name__}"
        return [Check("the loss equals the step-by-step one", None, reason)]
    checks = [_equal("global term equals the step-by-step one", terms.global_term, steps.global_term)]
    if terms.local_term is not None and steps.local_term is not None:
        checks.append(_equal("local term equals the step-by-step one", terms.local_term, steps.local_term))
    if isinstance(loss.weighting, PairsWeighting) and terms.koleo is None:
        checks.append(_equal("total equals the step-by-step one", terms.total, steps.total))
    if loss.centering.init == "zeros":
        checks.append(_equal("the center after the step equals it too", loss.centering.center, steps.center_after))
    return checks


def _equal(name: str, ours: Tensor, reference: Tensor) -> Check:
    off = (ours - reference).abs().max().item()
    scale = reference.abs().max().item()
    return Check(name, off <= TOLERANCE * max(scale, 1e-3), f"largest value {scale:.6g}, off by {off:.1e}")


def _gradients(model: StudentTeacher) -> list[Check]:
    trained = {name: p for name, p in model.student.named_parameters() if p.requires_grad}
    without = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    reached = f"{len(trained) - len(without)} of {len(trained)} tensors"
    detail = f"{reached}; none at {', '.join(without[:3])}" if without else reached
    touched = [name for name, p in model.teacher.named_parameters() if p.grad is not None or p.requires_grad]
    return [
        Check("gradients reach the whole student", not without, detail),
        Check("no gradient reaches the teacher", not touched, ", ".join(touched[:3]) or "none"),
    ]
