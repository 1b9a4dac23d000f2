"""How much the global and the local term count in the total.

The global term is the mean over the n_g pairs of a teacher's global view and another global view of the student,
the local term the mean over the n_l pairs of a teacher's global view and a student's local view.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dino.ranks import sum_over_ranks

WeightingName = Literal["pairs", "balanced", "adaptive"]
Weights = tuple[float | Tensor, float | Tensor]


class Weighting(nn.Module, ABC):
    """total = w_g * global term + w_l * local term, with (w_g, w_l) = `weights(n_g, n_l)`.

    `weights` reads the state and never changes it. During an optimizer step `observe` collects the terms of every
    micro-batch, `update` moves the state once after it. Weights without state leave these two as they are.
    """

    @abstractmethod
    def weights(self, num_global_pairs: int, num_local_pairs: int) -> Weights:
        """The two weights, floats or 0-d tensors without gradient. Not called where there are no local views."""

    def observe(self, global_term: Tensor, local_term: Tensor) -> None:
        """Collects the 0-d terms of one micro-batch."""

    def update(self, progress: float, skipped: Tensor | None = None) -> None:
        """Takes in what was observed; `progress` is the share of the run that is done, 0 to 1.

        Where `skipped` (0-d, bool, on the device) is true, it is dropped instead.
        """


class PairsWeighting(Weighting):
    """Every pair counts the same, so with 2 + 8 views the local term is 16/18 of the total (main_dino.py, DINOLoss)."""

    def weights(self, num_global_pairs: int, num_local_pairs: int) -> Weights:
        num_all = num_global_pairs + num_local_pairs
        return num_global_pairs / num_all, num_local_pairs / num_all


class BalancedWeighting(Weighting):
    """global + `local_weight` * local, however many pairs each has."""

    def __init__(self, local_weight: float = 1.0) -> None:
        super().__init__()
        self.local_weight = _checked_local_weight(local_weight)

    def weights(self, num_global_pairs: int, num_local_pairs: int) -> Weights:
        return 1.0, self.local_weight


class AdaptiveWeighting(Weighting):
    """From the weights of `pairs` at the start to equal contributions of the two terms at the end. An addition of ours.

    With m_g, m_l the running means of the two terms, M = (n_g m_g + n_l m_l) / (n_g + n_l) their mean over pairs, r the
    `local_weight` and p the share of the run that is done:

        a   = (1 - cos(pi p)) / 2                                       phase, 0 at the start and 1 at the end
        w_g = (1 - a) n_g / (n_g + n_l) + a M / ((1 + r) m_g)
        w_l = (1 - a) n_l / (n_g + n_l) + a M r / ((1 + r) m_l)

    So the local contribution w_l m_l ends as r times the global one, and w_g m_g + w_l m_l = M throughout: the size of
    the total, and with it the learning rate that suits, stays that of `pairs`. The first running means say
    little, and then the phase gives them no weight. Means and phase move once per optimizer step, over all
    micro-batches and ranks, and are part of the state.

    Args:
        local_weight: r.
        momentum: share of the old running means that stays, per optimizer step.

    Raises:
        ValueError: for a value out of its range.
    """

    magnitudes: Tensor  # [2]: m_g, m_l, not corrected for their start at 0: the weights depend on their ratio only
    phase: Tensor  # 0-d: a

    def __init__(self, local_weight: float = 1.0, momentum: float = 0.99) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"loss.weighting.momentum={momentum}: use a number from 0 to below 1")
        self.local_weight = _checked_local_weight(local_weight)
        self.momentum = momentum
        self.register_buffer("magnitudes", torch.zeros(2))
        self.register_buffer("phase", torch.zeros(()))
        self._sum: Tensor | None = None  # [3]: both terms and their number, since the last update

    @torch.no_grad()
    def weights(self, num_global_pairs: int, num_local_pairs: int) -> Weights:
        num_all = num_global_pairs + num_local_pairs
        global_mean, local_mean = self.magnitudes.clamp_min(torch.finfo(self.magnitudes.dtype).tiny).unbind()
        mean = (num_global_pairs * global_mean + num_local_pairs * local_mean) / num_all
        equal_global = mean / ((1 + self.local_weight) * global_mean)
        equal_local = mean * self.local_weight / ((1 + self.local_weight) * local_mean)
        start = 1 - self.phase
        return (
            start * num_global_pairs / num_all + self.phase * equal_global,
            start * num_local_pairs / num_all + self.phase * equal_local,
        )

    @torch.no_grad()
    def observe(self, global_term: Tensor, local_term: Tensor) -> None:
        seen = torch.stack([global_term.detach(), local_term.detach(), torch.ones_like(global_term)])
        self._sum = seen if self._sum is None else self._sum + seen

    @torch.no_grad()
    def update(self, progress: float, skipped: Tensor | None = None) -> None:
        assert 0 <= progress <= 1, f"a share of {progress} of the run is done"
        if self._sum is None:
            return
        summed = sum_over_ranks(self._sum)
        means = (summed[:2] / summed[2]).to(self.magnitudes.dtype)
        magnitudes = (self.magnitudes * self.momentum).add_(means, alpha=1 - self.momentum)
        phase = torch.full_like(self.phase, (1 - math.cos(math.pi * progress)) / 2)
        if skipped is None:
            skipped = torch.zeros((), dtype=torch.bool, device=phase.device)
        self.magnitudes.copy_(torch.where(skipped, self.magnitudes, magnitudes))
        self.phase.copy_(torch.where(skipped, self.phase, phase))
        self._sum = None


def make_weighting(name: WeightingName, local_weight: float) -> Weighting:
    """The weighting that the config calls `name`.

    Raises:
        ValueError: for an unknown name, and for a `local_weight` that `pairs` would ignore.
    """
    if name not in get_args(WeightingName):
        raise ValueError(f"loss.weighting={name}: use {', '.join(get_args(WeightingName))}")
    if name == "balanced":
        return BalancedWeighting(local_weight)
    if name == "adaptive":
        return AdaptiveWeighting(local_weight)
    if local_weight != 1:
        raise ValueError(
            f"loss.local_weight={local_weight} has no effect with loss.weighting=pairs: "
            "leave it at 1, or use loss.weighting=balanced or adaptive"
        )
    return PairsWeighting()


def _checked_local_weight(local_weight: float) -> float:
    if not 0 <= local_weight < math.inf:
        raise ValueError(f"loss.local_weight={local_weight}: use a number of 0 or more")
    return local_weight
