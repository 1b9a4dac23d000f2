"""One batch through student, teacher and loss in float32, keeping every intermediate.

Shapes: B images in the batch, G global views, L local views, V = G + L, K prototypes.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dino.debug import checks
from dino.debug.checks import Check
from dino.debug.subject import Subject
from dino.evaluation.distributions import Distributions
from dino.loss import DINOLoss, EMACentering, LossTerms
from dino.loss.reference import LossSteps, step_by_step
from dino.model import StudentTeacher
from dino.monitor.gradients import group_of
from dino.monitor.statistics import distribution_statistics, prototypes_of_batch


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
class Term:
    """A term of the loss; it counts `weight * value`."""

    name: str
    value: float
    weight: float


@dataclass(frozen=True)
class LossInspection:
    subject: Subject
    rows: list[Row]
    terms: list[Term]
    total: float
    statistics: dict[str, float]  # as a logged step has them under train/
    gradient_norms: dict[str, float]  # by group of layers
    distributions: Distributions
    checks: list[Check]

    @property
    def sound(self) -> bool:
        return all(check.holds is not False for check in self.checks)


def inspect_loss(subject: Subject) -> LossInspection:
    """One forward and one backward pass; the loss of `subject` takes its step, its networks get gradients only."""
    model, loss, views = subject.model, subject.loss, subject.views
    num_global_views = len(views.global_views)
    wiring = checks.wiring(model, subject.step)
    tensors = _state(model, loss)

    teacher = model.teacher_forward(views.global_views)
    student, features = model.student_forward(views.global_views, views.local_views)
    terms = loss(student, teacher, num_global_views, subject.teacher_temp, features)
    student_logits, teacher_logits = student.logits(), teacher.logits()
    targets = loss.centering.targets(teacher_logits, subject.teacher_temp)
    steps = _step_by_step(subject, student_logits, teacher_logits)
    statistics = _statistics(loss, student_logits, targets, num_global_views)
    distributions = Distributions.of(student_logits, targets, loss.student_temp, num_global_views)
    terms.total.backward()
    loss.observe(terms)
    loss.update(progress=0.0)

    shown = {"global_views": views.global_views}
    shown |= {"local_views": views.local_views} if views.local_views is not None else {}
    shown |= {"student_features": features, **_named(steps), "targets": targets, "loss": terms.total}
    gradients = {name: p.grad for name, p in model.student.named_parameters() if p.grad is not None}
    tensors |= shown | {f"the gradient of student.{name}": gradient for name, gradient in gradients.items()}
    found = _terms(loss, terms)
    return LossInspection(
        subject=subject,
        rows=[Row.of(name, tensor) for name, tensor in shown.items()],
        terms=found,
        total=terms.total.item(),
        statistics=statistics,
        gradient_norms=_gradient_norms(gradients),
        distributions=distributions,
        checks=[
            checks.finite(tensors),
            checks.shapes(views, student_logits, teacher_logits, features),
            *wiring,
            checks.logits_in_range(model, student_logits, teacher_logits),
            *checks.distributions(steps, targets),
            *checks.terms([(term.weight, term.value) for term in found], terms),
            *checks.against_reference(subject, terms, steps),
            checks.cross_entropy_above_entropy(statistics),
            *checks.tells_prototypes_apart(statistics, subject.teacher_temp, loss.student_temp),
            checks.tells_images_apart(statistics, subject),
            *checks.gradients(model),
        ],
    )


def _state(model: StudentTeacher, loss: DINOLoss) -> dict[str, Tensor]:
    """All that the step begins with, by name."""
    parts = {"student": model.student, "teacher": model.teacher, "loss": loss}
    return {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}


def _step_by_step(subject: Subject, student_logits: Tensor, teacher_logits: Tensor) -> LossSteps:
    centering = subject.loss.centering
    center, center_momentum = torch.zeros_like(teacher_logits[:1]), 0.0
    if isinstance(centering, EMACentering):
        center, center_momentum = centering.center.clone(), centering.momentum
    return step_by_step(
        student_logits,
        teacher_logits,
        num_global_views=len(subject.views.global_views),
        student_temp=subject.loss.student_temp,
        teacher_temp=subject.teacher_temp,
        center=center,
        center_momentum=center_momentum,
    )


def _named(steps: LossSteps) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for field in dataclasses.fields(steps):
        value: Any = getattr(steps, field.name)
        if isinstance(value, Tensor):
            named[field.name] = value
        elif isinstance(value, list):
            named |= {f"{field.name}[{view}]": tensor for view, tensor in enumerate(value)}
        elif isinstance(value, dict):
            named |= {f"{field.name}[{i},{j}]": tensor for (i, j), tensor in value.items()}
    return named


def _terms(loss: DINOLoss, terms: LossTerms) -> list[Term]:
    weights = [float(weight) for weight in terms.weights]
    found = [Term("cross-entropy, global views", terms.global_term.item(), weights[0])]
    if terms.local_term is not None:
        found.append(Term("cross-entropy, local views", terms.local_term.item(), weights[1]))
    if terms.koleo is not None:
        found.append(Term("KoLeo", terms.koleo.item(), loss.koleo_weight))
    return found


def _statistics(loss: DINOLoss, student_logits: Tensor, targets: Tensor, num_global_views: int) -> dict[str, float]:
    with torch.no_grad():
        views = student_logits.chunk(num_global_views * len(student_logits) // len(targets))
        named = distribution_statistics(views, targets, loss.student_temp, num_global_views)
        used, mean = prototypes_of_batch(targets)
        named |= {"entropy_batch_mean": torch.special.entr(mean).sum(), "num_prototypes_used": (used > 0).sum()}
    return {"loss_uniform": math.log(student_logits.shape[-1]), **{name: float(value) for name, value in named.items()}}


def _gradient_norms(gradients: dict[str, Tensor]) -> dict[str, float]:
    squares: dict[str, float] = {}
    for name, gradient in gradients.items():
        squares[group_of(name)] = squares.get(group_of(name), 0.0) + gradient.double().square().sum().item()
    return {group: math.sqrt(square) for group, square in squares.items()}
