"""The DINO objective.

Shapes: B images in the batch, G global views, L local views, V = G + L, K prototypes, D features. Rows are view-major:
all images of view 0, then of view 1, and so on; global views come first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from dino.loss.centering import Centering
from dino.loss.koleo import koleo_loss
from dino.loss.precision import at_least_float32, no_autocast
from dino.loss.weighting import WeightingName, Weights, make_weighting


@dataclass(frozen=True)
class LossTerms:
    """The total and what it is made of. The terms are 0-d and carry gradients."""

    total: Tensor
    global_term: Tensor
    local_term: Tensor | None  # None without local views
    koleo: Tensor | None  # before its weight; None where it is not used
    weights: Weights  # of the global and the local term
    targets: Tensor  # [G*B, K], the teacher's probabilities that the student was compared with; no gradient


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
    cross-entropy is the sum of products of a probability and minus a log-probability, so never negative.

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
    ) -> None:
        super().__init__()
        if not 0 < student_temp < math.inf:
            raise ValueError(f"loss.student_temp={student_temp}: use a number above 0")
        if not 0 <= koleo_weight < math.inf:
            raise ValueError(f"loss.koleo_weight={koleo_weight}: use a number of 0 or more")
        self.centering = centering
        self.student_temp = student_temp
        self.weighting = make_weighting(weighting, local_weight)
        self.koleo_weight = koleo_weight

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        num_global_views: int,
        teacher_temp: float,
        student_features: Tensor | None = None,
    ) -> LossTerms:
        """Student logits [V*B, K], teacher logits [G*B, K] and, for KoLeo, student features [V*B, D] to the terms.

        Arithmetic is in float32 at least, also under autocast; float64 stays float64.

        Raises:
            ValueError: for a temperature that is not positive, shapes that do not fit together, and missing features.
        """
        if not 0 < teacher_temp < math.inf:
            raise ValueError(f"loss.teacher_temp={teacher_temp}: use a number above 0")
        num_views = _num_views(student_logits, teacher_logits, num_global_views)
        with no_autocast(student_logits):
            all_views = self.centering.targets(teacher_logits, teacher_temp)  # [G*B, K]
            targets = all_views.chunk(num_global_views)  # G x [B, K]
            # Chunks, not indices: the gradient of a chunk is put together once, that of an index is padded to [V*B, K].
            student = student_logits.chunk(num_views)
            global_views, local_views = student[:num_global_views], student[num_global_views:]
            num_global, num_local = num_pairs(num_global_views, len(local_views))
            global_sums = [self._cross_entropy(view, _summed(targets, but=j)) for j, view in enumerate(global_views)]
            global_term = _summed(global_sums) / num_global
            local_term = None
            weights: Weights = (1.0, 0.0)
            total = global_term
            if local_views:
                all_targets = _summed(targets)
                local_term = _summed([self._cross_entropy(view, all_targets) for view in local_views]) / num_local
                weights = self.weighting.weights(num_global, num_local)
                total = weights[0] * global_term + weights[1] * local_term
            koleo = self._koleo(student_features, num_views, num_global_views)
            if koleo is not None:
                total = total + self.koleo_weight * koleo
        return LossTerms(total, global_term, local_term, koleo, weights, all_views)

    def observe(self, teacher_logits: Tensor, terms: LossTerms) -> None:
        """Collects what one micro-batch showed: its teacher logits [G*B, K] and its terms."""
        self.centering.observe(teacher_logits)
        if terms.local_term is not None:
            self.weighting.observe(terms.global_term, terms.local_term)

    def update(self, progress: float, skipped: Tensor | None = None) -> None:
        """Moves center and weights, once per optimizer step; `progress` is the share of the run done, 0 to 1.

        Where `skipped` (0-d, bool, on the device) is true, what was observed is dropped instead.
        """
        self.centering.update(skipped)
        self.weighting.update(progress, skipped)

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits [B, K] against targets [B, K]; the mean over images, 0-d."""
        log_probabilities = F.log_softmax(at_least_float32(logits) / self.student_temp, dim=-1)
        return -(targets * log_probabilities).sum(dim=-1).mean()

    def _koleo(self, features: Tensor | None, num_views: int, num_global_views: int) -> Tensor | None:
        if self.koleo_weight == 0:
            return None
        if features is None:
            raise ValueError(
                f"loss.koleo_weight={self.koleo_weight} needs the student's features: pass student_features"
            )
        views = features.chunk(num_views)[:num_global_views]
        return _summed([koleo_loss(view) for view in views]) / num_global_views


def _num_views(student_logits: Tensor, teacher_logits: Tensor, num_global_views: int) -> int:
    """V, from the number of rows; refuses shapes that are not whole views of the same images and prototypes."""
    if num_global_views < 2:
        raise ValueError(f"num_global_views={num_global_views}: use at least 2, a view is never compared with itself")
    batch = len(teacher_logits) // num_global_views
    fits = batch > 0 and len(teacher_logits) == batch * num_global_views
    fits = fits and len(student_logits) % batch == 0 and len(student_logits) >= len(teacher_logits)
    if not fits or student_logits.ndim != 2 or student_logits.shape[1:] != teacher_logits.shape[1:]:
        raise ValueError(
            f"student logits {list(student_logits.shape)} and teacher logits {list(teacher_logits.shape)} with "
            f"{num_global_views} global views: use [V*B, K] and [{num_global_views}*B, K]"
        )
    return len(student_logits) // batch


def _summed(tensors: Sequence[Tensor], but: int | None = None) -> Tensor:
    """The sum of all but one. Not the sum of all minus that one, which could come out below 0."""
    first, *others = (tensor for index, tensor in enumerate(tensors) if index != but)
    for other in others:
        first = first + other
    return first
