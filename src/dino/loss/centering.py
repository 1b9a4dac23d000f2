"""From teacher logits to targets: what keeps the teacher from collapsing.

Shapes: N rows (views x images), K prototypes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dino.loss.precision import at_least_float32, no_autocast
from dino.model.projection import logits_at_a_time, slices
from dino.ranks import max_over_ranks, sum_over_ranks, sum_over_ranks_meanwhile

CenterInit = Literal["zeros", "first_batch"]


class Centering(nn.Module, ABC):
    """How the teacher's logits become probabilities.

    `targets` reads the state and never changes it. During an optimizer step `observe` collects what is known of the
    teacher logits of every micro-batch, `send` lets the ranks add it up while the step goes on, and `update` moves the
    state once, after the step.
    """

    @abstractmethod
    def targets(self, teacher_logits: Tensor, temp: float) -> Tensor:
        """Logits [N, K] to probabilities [N, K], each row summing to 1, without gradient, in at least float32."""

    @abstractmethod
    def observe(self, logits_sum: Tensor, num_rows: int) -> None:
        """Collects the sum [1, K] of the N rows of logits of one micro-batch."""

    @abstractmethod
    def send(self) -> None:
        """All micro-batches of the step are observed: begins to add them up over the ranks. `update` does it too."""

    @abstractmethod
    def update(self, skipped: Tensor | None = None) -> None:
        """Takes in what was observed since the last update, over all micro-batches and ranks.

        Where `skipped` (0-d, bool, on the device) is true, it is dropped instead.
        """

    @abstractmethod
    def reset(self) -> None:
        """Back to the state of a new object."""


class EMACentering(Centering):
    """softmax((logits - center) / temp), with the center a moving average of the mean teacher logits.

    Paper section 3.1 (eq. 4); main_dino.py, DINOLoss.update_center. The mean is over all rows observed, of both global
    views, all micro-batches and all ranks, of the raw logits: neither centered nor divided by the temperature.

    Args:
        out_dim: K.
        momentum: share of the old center that stays, per optimizer step. The paper finds 0 to 0.99 about equal and a
            collapse at 0.999.
        init: `zeros` (the original): the center grows from 0. `first_batch`: the first update sets it to the mean
            itself. Either way the targets of the very first step are not centered.

    Raises:
        ValueError: for a value out of its range.
    """

    center: Tensor  # [1, K]

    def __init__(self, out_dim: int, momentum: float = 0.9, init: CenterInit = "zeros") -> None:
        super().__init__()
        if out_dim < 1:
            raise ValueError(f"head.out_dim={out_dim}: use a whole number of at least 1")
        if not 0 <= momentum <= 1:
            raise ValueError(f"loss.center_momentum={momentum}: use a number from 0 to 1")
        if init not in get_args(CenterInit):
            raise ValueError(f"loss.centering.init={init}: use {' or '.join(get_args(CenterInit))}")
        self.momentum = momentum
        self.init = init
        self.register_buffer("center", torch.zeros(1, out_dim))
        # Whether the first batch has been seen; on the device, so that reading it costs no synchronisation. With zeros
        # there is none, and the state is the original's: `center` alone.
        self.register_buffer("started", torch.zeros((), dtype=torch.bool) if init == "first_batch" else None)
        self._sum: Tensor | None = None  # [1, K], of the rows observed since the last update
        self._count = 0
        self._arriving: Callable[[], Tensor] | None = None  # [1, K + 1]: sum and count over all ranks

    @torch.no_grad()
    def targets(self, teacher_logits: Tensor, temp: float) -> Tensor:
        dtype = torch.promote_types(teacher_logits.dtype, torch.float32)
        targets = torch.empty_like(teacher_logits, dtype=dtype)
        with no_autocast(teacher_logits):
            # Some rows at a time: nothing but the targets is of their size.
            for part in slices(len(targets), max(1, logits_at_a_time(targets.device) // targets.shape[1])):
                scores = at_least_float32(teacher_logits[part]) - self.center
                targets[part] = torch.softmax(scores.div_(temp), dim=-1)
        return targets

    @torch.no_grad()
    def observe(self, logits_sum: Tensor, num_rows: int) -> None:
        self._sum = logits_sum if self._sum is None else self._sum + logits_sum
        self._count += num_rows

    @torch.no_grad()
    def send(self) -> None:
        if self._sum is not None and self._arriving is None:
            count = self._sum.new_full((1, 1), self._count)
            self._arriving = sum_over_ranks_meanwhile(torch.cat([self._sum, count], dim=1))  # one message for both

    @torch.no_grad()
    def update(self, skipped: Tensor | None = None) -> None:
        self.send()
        if self._arriving is None:
            return
        summed = self._arriving()
        mean = (summed[:, :-1] / summed[:, -1:]).to(self.center.dtype)
        moved = self.center * self.momentum + mean * (1 - self.momentum)
        unusable = ~mean.isfinite().all()  # a single infinite logit would stay in the center for good
        skipped = unusable if skipped is None else skipped | unusable
        if isinstance(self.started, Tensor):
            moved = torch.where(self.started, moved, mean)
            self.started.logical_or_(~skipped)
        self.center.copy_(torch.where(skipped, self.center, moved))
        self._sum, self._count, self._arriving = None, 0, None

    def reset(self) -> None:
        self.center.zero_()
        if isinstance(self.started, Tensor):
            self.started.fill_(False)
        self._sum, self._count, self._arriving = None, 0, None


class SinkhornKnopp(Centering):
    """Targets that use all prototypes equally often within the batch (SwAV, Caron et al. 2020; DINOv2).

    exp(logits / temp) [N, K] is scaled in turn so that every column has the same sum and every row sums to 1, rows
    last. Done on logarithms, so that no exponential overflows at a low temperature. The batch is all rows given at
    once, of all ranks; there is no state, so several micro-batches are not the same as one large batch.

    Args:
        num_iterations: column-row rounds; 3 in SwAV and DINOv2.

    Raises:
        ValueError: for less than one iteration.
    """

    def __init__(self, num_iterations: int = 3) -> None:
        super().__init__()
        if num_iterations < 1:
            raise ValueError(f"loss.centering.num_iterations={num_iterations}: use a whole number of at least 1")
        self.num_iterations = num_iterations

    @torch.no_grad()
    def targets(self, teacher_logits: Tensor, temp: float) -> Tensor:
        with no_autocast(teacher_logits):
            log_q = at_least_float32(teacher_logits) / temp
            for _ in range(self.num_iterations):
                log_q = log_q - _log_sum_exp_of_columns(log_q)
                log_q = torch.log_softmax(log_q, dim=-1)
            return log_q.exp_()

    def observe(self, logits_sum: Tensor, num_rows: int) -> None:
        """Nothing: the batch balances itself."""

    def send(self) -> None:
        """Nothing to add up."""

    def update(self, skipped: Tensor | None = None) -> None:
        """Nothing to move."""

    def reset(self) -> None:
        """Nothing to reset."""


def _log_sum_exp_of_columns(log_q: Tensor) -> Tensor:
    """[N, K] to [1, K], over the rows of all ranks."""
    largest = max_over_ranks(log_q.amax(dim=0, keepdim=True))
    return sum_over_ranks((log_q - largest).exp_().sum(dim=0, keepdim=True)).log_() + largest
