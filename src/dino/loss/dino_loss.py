"""The DINO objective.

Shapes: B images in the batch, G global views, L local views, V = G + L, K prototypes, D features. Rows are view-major:
all images of view 0, then of view 1, and so on; global views come first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino.loss.centering import Centering, EMACentering
from dino.loss.fused import cross_entropies_of_logits, cross_entropies_of_projection
from dino.loss.koleo import koleo_loss
from dino.loss.precision import at_least_float32, no_autocast
from dino.loss.sliced import SlicedSettings, sliced_cross_entropies
from dino.loss.weighting import WeightingName, Weights, make_weighting
from dino.model.projection import Projection

Implementation = Literal["auto", "plain", "fused", "sliced"]


@dataclass(frozen=True)
class LossTerms:
    """The total and what it is made of. The terms are 0-d and carry gradients."""

    total: Tensor
    global_term: Tensor
    local_term: Tensor | None  # None without local views
    koleo: Tensor | None  # before its weight; None where it is not used
    weights: Weights  # of the global and the local term
    teacher_sum: Tensor  # [1, K], the sum of the teacher's raw logits over its rows; no gradient
    num_rows: int  # G*B


def num_pairs(num_global_views: int, num_local_views: int) -> tuple[int, int]:
    """How many (teacher view, student view) pairs the global and the local term are means of: G (G - 1) and G L."""
    return num_global_views * (num_global_views - 1), num_global_views * num_local_views


class DINOLoss(nn.Module):
    """Cross-entropy between every global view of the teacher and every other view of the student.

    Paper, eq. 3 and algorithm 1; main_dino.py, DINOLoss. In nested loops, with `pairs` weighting:

        total, count = 0, 0
        for i in range(G):                                        # teacher views, global only
            p = softmax((teacher[i] - center) / teacher_temp)     # [B, K], no gradient
            for j in range(V):                                    # student views
                if j == i:
                    continue                                      # the same view of the same image
                log_q = log_softmax(student[j] / student_temp)    # [B, K]
                total += -(p * log_q).sum(-1).mean()
                count += 1
        loss = total / count

    It is linear in p, so the targets that a student view is compared with are summed first: V products of [B, K] in
    place of G * V, the same result. Global and local pairs are averaged apart and put together by the weighting. Every
    cross-entropy is the sum of products of a probability and minus a log-probability, so negative by rounding at most.

    `forward` changes no state. A training step calls `observe` for each micro-batch and `update` once at its end, so
    that step n trains with the center of step n - 1, as the original.

    Args:
        centering: from teacher logits to targets; holds the center.
        student_temp: softmax temperature of the student.
        weighting: `pairs` (every pair counts the same, the original), `balanced` (global + local_weight * local) or
            `adaptive` (see `AdaptiveWeighting`).
        local_weight: weight of the local term relative to the global one, for `balanced` and `adaptive`.
        koleo_weight: weight of the KoLeo term, a mean over the student's global views; 0 turns it off. (DINOv2 sums
            over its two views, so its 0.1 is 0.2 here.)
        implementation: of the cross-entropies, all of one value. `plain`: the formula, by autograd. `fused`: from whole
            logits without copies of them. `sliced`: logits are made slice by slice and never held; slower, in less
            memory. `auto`: `fused`, or `sliced` after `save_memory`.

    Raises:
        ValueError: for a value out of its range.
    """

    def __init__(
        self,
        centering: Centering,
        student_temp: float = 0.1,
        weighting: WeightingName = "pairs",
        local_weight: float = 1.0,
        koleo_weight: float = 0.0,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        if not 0 < student_temp < math.inf:
            raise ValueError(f"loss.student_temp={student_temp}: use a number above 0")
        if not 0 <= koleo_weight < math.inf:
            raise ValueError(f"loss.koleo_weight={koleo_weight}: use a number of 0 or more")
        if implementation not in get_args(Implementation):
            raise ValueError(f"loss.implementation={implementation}: use {', '.join(get_args(Implementation))}")
        if implementation == "sliced" and not isinstance(centering, EMACentering):
            raise ValueError(
                f"loss.implementation=sliced: {type(centering).__name__} needs all logits at once; use auto or fused"
            )
        self.centering = centering
        self.student_temp = student_temp
        self.weighting = make_weighting(weighting, local_weight)
        self.koleo_weight = koleo_weight
        self.implementation = implementation

    def forward(
        self,
        student: Tensor | Projection,
        teacher: Tensor | Projection,
        num_global_views: int,
        teacher_temp: float,
        student_features: Tensor | None = None,
    ) -> LossTerms:
        """Student [V*B, K], teacher [G*B, K] and, for KoLeo, student features [V*B, D] to the terms.

        Student and teacher are logits, or what logits are products of. Arithmetic is in float32 at least, also under
        autocast; float64 stays float64.

        Raises:
            ValueError: for a temperature that is not positive, shapes that do not fit together, and missing features.
        """
        if not 0 < teacher_temp < math.inf:
            raise ValueError(f"loss.teacher_temp={teacher_temp}: use a number above 0")
        num_views = _num_views(_shape(student), _shape(teacher), num_global_views)
        with no_autocast(student.rows if isinstance(student, Projection) else student):
            losses, teacher_sum = self._cross_entropies(student, teacher, num_global_views, teacher_temp)
            num_global, num_local = num_pairs(num_global_views, num_views - num_global_views)
            global_term = losses[:num_global_views].sum() / num_global
            local_term = None
            weights: Weights = (1.0, 0.0)
            total = global_term
            if num_local:
                local_term = losses[num_global_views:].sum() / num_local
                weights = self.weighting.weights(num_global, num_local)
                total = weights[0] * global_term + weights[1] * local_term
            koleo = self._koleo(student_features, num_views, num_global_views)
            if koleo is not None:
                total = total + self.koleo_weight * koleo
        return LossTerms(total, global_term, local_term, koleo, weights, teacher_sum, _shape(teacher)[0])

    def save_memory(self) -> None:
        """Makes of `auto` what takes the least memory."""
        if self.implementation == "auto" and isinstance(self.centering, EMACentering):
            self.implementation = "sliced"

    def observe(self, terms: LossTerms) -> None:
        """Collects what one micro-batch showed."""
        self.centering.observe(terms.teacher_sum, terms.num_rows)
        if terms.local_term is not None:
            self.weighting.observe(terms.global_term, terms.local_term)

    def send(self) -> None:
        """All micro-batches of a step are observed: the ranks may add them up behind its backward pass."""
        self.centering.send()

    def update(self, progress: float, skipped: Tensor | None = None) -> None:
        """Moves center and weights, once per optimizer step; `progress` is the share of the run done, 0 to 1.

        Where `skipped` (0-d, bool, on the device) is true, what was observed is dropped instead.
        """
        self.centering.update(skipped)
        self.weighting.update(progress, skipped)

    def _cross_entropies(
        self, student: Tensor | Projection, teacher: Tensor | Projection, num_global_views: int, teacher_temp: float
    ) -> tuple[Tensor, Tensor]:
        """Of every student view, with all teacher views but the same one, [V]; and the sum of teacher logits [1, K]."""
        if self.implementation == "sliced":
            assert isinstance(self.centering, EMACentering)
            if isinstance(student, Tensor) or isinstance(teacher, Tensor):
                raise ValueError("loss.implementation=sliced takes what logits are made of, not logits")
            settings = SlicedSettings(num_global_views, self.student_temp, teacher_temp)
            return sliced_cross_entropies(student, teacher, self.centering.center, settings)
        plain = self.implementation == "plain"
        with torch.no_grad():
            teacher_logits = _logits(teacher, plain)
            targets = self.centering.targets(teacher_logits, teacher_temp)  # [G*B, K]
            teacher_sum = at_least_float32(teacher_logits).sum(dim=0, keepdim=True)
        if plain:
            losses = self._plain(_logits(student, plain), targets.chunk(num_global_views))
        elif isinstance(student, Projection):
            losses = cross_entropies_of_projection(student, targets, num_global_views, self.student_temp)
        else:
            losses = cross_entropies_of_logits(student, targets, num_global_views, self.student_temp)
        return losses, teacher_sum

    def _plain(self, student_logits: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """Logits [V*B, K] against G targets [B, K] to [V]."""
        losses = []
        # Chunks, not indices: the gradient of a chunk is put together once, that of an index is padded to [V*B, K].
        for j, logits in enumerate(student_logits.chunk(len(student_logits) // len(targets[0]))):
            log_probabilities = F.log_softmax(at_least_float32(logits) / self.student_temp, dim=-1)
            losses.append(-(_summed(targets, but=j) * log_probabilities).sum(dim=-1).mean())
        return torch.stack(losses)

    def _koleo(self, features: Tensor | None, num_views: int, num_global_views: int) -> Tensor | None:
        if self.koleo_weight == 0:
            return None
        if features is None:
            raise ValueError(
                f"loss.koleo_weight={self.koleo_weight} needs the student's features: pass student_features"
            )
        return koleo_loss(torch.unflatten(features, 0, (num_views, -1))[:num_global_views])


def _shape(output: Tensor | Projection) -> tuple[int, ...]:
    """Of the logits."""
    return tuple(output.shape) if isinstance(output, Tensor) else (len(output.rows), len(output.directions))


def _logits(output: Tensor | Projection, plain: bool) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output.rows @ output.prototypes().to(output.rows).T if plain else output.logits()


def _num_views(student: tuple[int, ...], teacher: tuple[int, ...], num_global_views: int) -> int:
    """V, from the shapes of the logits; refuses those that are not whole views of the same images and prototypes."""
    if num_global_views < 2:
        raise ValueError(f"num_global_views={num_global_views}: use at least 2, a view is never compared with itself")
    batch = teacher[0] // num_global_views
    fits = batch > 0 and teacher[0] == batch * num_global_views
    fits = fits and student[0] % batch == 0 and student[0] >= teacher[0]
    if not fits or len(student) != 2 or student[1:] != teacher[1:]:
        raise ValueError(
            f"student logits {list(student)} and teacher logits {list(teacher)} with "
            f"{num_global_views} global views: use [V*B, K] and [{num_global_views}*B, K]"
        )
    return student[0] // batch


def _summed(tensors: Sequence[Tensor], but: int | None = None) -> Tensor:
    """The sum of all but one. Not the sum of all minus that one, which could come out below 0."""
    first, *others = (tensor for index, tensor in enumerate(tensors) if index != but)
    for other in others:
        first = first + other
    return first
