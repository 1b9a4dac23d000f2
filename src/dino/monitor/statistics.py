"""What a logged step tells about student and teacher.

The loss splits into cross-entropy = H(teacher) + KL(teacher || student) (paper, section 5.3 and Fig. 7), and how a run
collapses shows in the parts: a KL of 0 is a collapse; with it an entropy of 0 means one constant output (no centering)
and an entropy of ln K a uniform one (no sharpening).

Shapes: B images in the micro-batch, G global views, V all views, K prototypes, P parameters with a gradient.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dino.loss import DINOLoss, EMACentering, LossTerms
from dino.monitor.gradients import gradient_distributions, gradient_norms
from dino.ranks import sum_over_ranks, world_size


@dataclass(frozen=True)
class OutputStatistics:
    """What the outputs of student and teacher tell of one micro-batch, on the device."""

    values: dict[str, Tensor]  # 0-d each, `distribution_statistics`
    used: Tensor  # [K], 1 where a prototype is the most likely one of some teacher output
    mean: Tensor  # [K], of the teacher's outputs

    @classmethod
    @torch.no_grad()
    def of(
        cls, student_views: Iterable[Tensor], targets: Tensor, student_temp: float, num_global_views: int = 2
    ) -> "OutputStatistics":
        """Of the student's logits, V x [B, K], and the teacher's probabilities, [G*B, K]."""
        values = distribution_statistics(student_views, targets, student_temp, num_global_views)
        return cls(values, *prototypes_of_batch(targets))


class StepFigures(Protocol):
    """The part of a step's output that statistics are made of."""

    @property
    def outputs(self) -> OutputStatistics | None: ...  # not None, where the step was told to observe them

    @property
    def terms(self) -> LossTerms: ...

    @property
    def grad_norm(self) -> Tensor: ...  # 0-d, before clipping

    @property
    def grad_norms(self) -> Tensor: ...  # [P], the same for each parameter

    @property
    def grad_names(self) -> Sequence[str]: ...  # P names


@dataclass(frozen=True)
class Statistics:
    """Metrics under `train/` and `grad/`, of the first step and of every `every_steps`-th.

    Losses and distributions are those of the last micro-batch of a step, gradients those of the whole step.

    Args:
        every_steps: period.
        gradients_every: at one of so many logged steps the distribution of the gradients is measured too.

    Raises:
        ValueError: for a period below 1.
    """

    every_steps: int = 10
    gradients_every: int = 10

    def __post_init__(self) -> None:
        for name in ("every_steps", "gradients_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"monitor.{name}={getattr(self, name)}: use a whole number of at least 1")

    def due(self, step: int) -> bool:
        """Whether step number `step`, counted from 0, is logged: with a period of 10 the 1st, 10th, 20th, ..."""
        return step == 0 or (step + 1) % self.every_steps == 0

    def compute(self, step: int, figures: StepFigures, loss: DINOLoss, student: nn.Module) -> dict[str, float]:
        """Everything about one step; the host waits for the device once, when all of it is read.

        Teacher probabilities are those that the step trained with, so that `entropy_teacher + kl_teacher_student` is
        `cross_entropy`, which is the loss without KoLeo and with all pairs weighted equally. Of the whole batch:
        `num_prototypes_used` counts the prototypes that are the most likely one of some teacher output;
        `entropy_batch_mean` is the entropy of the mean teacher output [nats], and what of it is left after
        `entropy_teacher` is the `mutual_information` of image and prototype: 0 in every collapse.

        Under several ranks all of them call it; one message puts their parts together, and the values are those of the
        batch of all.

        Args:
            step: its number, counted from 0.
            figures: what the step has left.
            loss: read, not changed.
            student: whose gradients still lie in its parameters.
        """
        outputs = figures.outputs
        assert outputs is not None, "the step was not told to observe its outputs"
        with torch.no_grad():
            values = {**loss_statistics(figures.terms), **outputs.values, "grad_norm": figures.grad_norm}
            if isinstance(loss.centering, EMACentering):
                values["center_norm"] = loss.centering.center.norm()
            values = {f"train/{name}": value for name, value in values.items()}
            values |= gradient_norms(figures.grad_names, figures.grad_norms)
            if step == 0 or (step + 1) % (self.every_steps * self.gradients_every) == 0:
                values |= gradient_distributions(student, figures.grad_names)
            own = torch.stack([value.to(figures.terms.total) for value in values.values()])
            num_prototypes = len(outputs.mean)
            message = torch.cat([own, outputs.used.to(own), outputs.mean.to(own)])
            scalars, used, mean = torch.split(sum_over_ranks(message), [len(own), num_prototypes, num_prototypes])
            entropy_batch_mean = torch.special.entr(mean / world_size()).sum()
            shared = torch.stack([(used > 0).sum().to(own), entropy_batch_mean])
            *numbers, num_used, batch_entropy = torch.cat([scalars / world_size(), shared]).tolist()
        return {
            **dict(zip(values, numbers, strict=True)),
            "train/num_prototypes_used": num_used,
            "train/entropy_batch_mean": batch_entropy,
            "train/mutual_information": batch_entropy - numbers[list(values).index("train/entropy_teacher")],
            "train/loss_uniform": math.log(num_prototypes),
        }


def loss_statistics(terms: LossTerms) -> dict[str, Tensor]:
    """The loss, those of its terms that this run has, and the weights of the global and the local one; each 0-d."""
    named = {
        "loss": terms.total,
        "loss_global": terms.global_term,
        "loss_local": terms.local_term,
        "loss_koleo": terms.koleo,
    }
    statistics = {name: value.detach() for name, value in named.items() if value is not None}
    if terms.local_term is not None:
        for name, weight in zip(("weight_global", "weight_local"), terms.weights, strict=True):
            statistics[name] = weight if isinstance(weight, Tensor) else terms.total.new_full((), weight)
    return statistics


def prototypes_of_batch(teacher_probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """[G*B, K] to two [K]: 1 where a prototype is the most likely one of some output, and the mean of the outputs."""
    probabilities = _raised(teacher_probabilities)
    used = probabilities.new_zeros(probabilities.shape[-1])
    return used.scatter_(0, probabilities.argmax(dim=-1), 1.0), probabilities.mean(dim=0)


def distribution_statistics(
    student_views: Iterable[Tensor], teacher_probabilities: Tensor, student_temp: float, num_global_views: int
) -> dict[str, Tensor]:
    """How sharp and how alike the outputs of teacher and student are; every value is 0-d.

    Computed in at least float32, of the outputs of this rank. Entropies and KL are in nats. Means over pairs run over
    the pairs of the loss: teacher view i with every student view j other than i, all pairs counting equally.

    - `cross_entropy`: mean over pairs; `entropy_teacher + kl_teacher_student`.
    - `entropy_teacher`, `entropy_student`: mean entropy of the outputs, from 0 to ln K; the student's also for its
      global and local views alone (`entropy_student_global`, `entropy_student_local`).
    - `kl_teacher_student`: mean over pairs of KL(teacher || student).
    - `confidence_teacher`, `confidence_student`: mean largest probability.
    - `teacher_agreement`: share of images for which all teacher views have the same most likely prototype.
    - `student_teacher_agreement`: share of pairs whose most likely prototypes are the same.

    Args:
        student_views: logits of V views, [B, K] each; may be made one at a time.
        teacher_probabilities: [G*B, K], view-major.
        student_temp: temperature of the student's softmax.
        num_global_views: G.
    """
    num_prototypes = teacher_probabilities.shape[-1]
    teacher = _raised(teacher_probabilities).reshape(num_global_views, -1, num_prototypes)  # [G, B, K]
    confidence, teacher_top = teacher.max(dim=-1)  # [G, B]
    entropy_teacher = torch.special.entr(teacher).sum(dim=-1).mean()

    entropies, confidences, cross_entropies, agreements = [], [], [], []
    for j, logits in enumerate(student_views):
        compared = [i for i in range(num_global_views) if i != j]
        log_probabilities = torch.log_softmax(_raised(logits) / student_temp, dim=-1)  # [B, K]
        largest, student_top = log_probabilities.max(dim=-1)  # [B]
        entropies.append(-(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean())
        confidences.append(largest.exp().mean())
        # Linear in the teacher: the sum over pairs needs one product with the sum of its views.
        cross_entropies.append(-(teacher[compared].sum(dim=0) * log_probabilities).sum(dim=-1).mean())
        agreements.append((teacher_top[compared] == student_top).sum(dim=0, dtype=teacher.dtype).mean())

    num_views = len(entropies)
    num_pairs = num_global_views * (num_views - 1)
    cross_entropy = torch.stack(cross_entropies).sum() / num_pairs
    entropy_student = torch.stack(entropies)  # [V]
    statistics = {
        "cross_entropy": cross_entropy,
        "entropy_teacher": entropy_teacher,
        "entropy_student": entropy_student.mean(),
        "entropy_student_global": entropy_student[:num_global_views].mean(),
        "kl_teacher_student": (cross_entropy - entropy_teacher).clamp(min=0),  # below 0 only by rounding
        "confidence_teacher": confidence.mean(),
        "confidence_student": torch.stack(confidences).mean(),
        "teacher_agreement": (teacher_top == teacher_top[:1]).all(dim=0).to(teacher.dtype).mean(),
        "student_teacher_agreement": torch.stack(agreements).sum() / num_pairs,
    }
    if num_views > num_global_views:
        statistics["entropy_student_local"] = entropy_student[num_global_views:].mean()
    return statistics


def _raised(values: Tensor) -> Tensor:
    """In float32 at least; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()
