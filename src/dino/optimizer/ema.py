"""The teacher: an exponential moving average of the student."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Buffers = Literal["own", "copy", "average"]


class EMA:
    """Moves a teacher towards its student: teacher = momentum * teacher + (1 - momentum) * student.

    Called after the optimizer step with the momentum of that step (main_dino.py, train_one_epoch). The host waits for
    nothing.

    Args:
        buffers: what happens to buffers (running statistics of batch norm). `own`: they stay the teacher's, which sees
            the images itself (the original); `copy`: the student's values; `average`: moved like parameters, where
            they are floating point, and copied where they are counters (num_batches_tracked).

    Raises:
        ValueError: for an unknown value of `buffers`.
    """

    def __init__(self, buffers: Buffers = "own") -> None:
        if buffers not in get_args(Buffers):
            raise ValueError(f"ema.buffers={buffers}: use {', '.join(get_args(Buffers))}")
        self.buffers = buffers
        self._networks: tuple[nn.Module, nn.Module] | None = None
        self._parameters: list[tuple[Tensor, Tensor]] = []  # theirs, so that no step walks through both

    @torch.no_grad()
    def update(self, student: nn.Module, teacher: nn.Module, momentum: float, skipped: Tensor | None = None) -> None:
        """One update. The two modules must have the same parameters and buffers in the same order, and keep them: the
        parameters of the first call with them are the ones that move.

        Where `skipped` (0-d, bool, on their device) is true the parameters stay as they are, without a look at it from
        the host. (A skipped step leaves the student as it was, so its buffers may be copied again.)

        Raises:
            ValueError: for a momentum outside of 0 to 1.
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"ema.momentum={momentum}: use a number from 0 to 1")
        if self._networks != (student, teacher):
            self._networks = student, teacher
            self._parameters = _pairs(list(teacher.parameters()), list(student.parameters()))
        moved = list(self._parameters)
        if self.buffers != "own":
            buffers = _pairs(list(teacher.buffers()), list(student.buffers()))
            averaged = [pair for pair in buffers if self.buffers == "average" and pair[0].is_floating_point()]
            copied = [pair for pair in buffers if self.buffers == "copy" or not pair[0].is_floating_point()]
            moved += averaged
            if copied:
                torch._foreach_copy_([own for own, _ in copied], [other for _, other in copied])
        if moved:
            own, other = [pair[0] for pair in moved], [pair[1] for pair in moved]
            torch._foreach_lerp_(own, other, _weights(own, 1 - momentum, skipped))


def half_life_steps(momentum: float) -> float:
    """After how many steps half of the teacher has been replaced, at a constant momentum; infinite at 1, 0 at 0."""
    if momentum >= 1:
        return math.inf
    return math.log(0.5) / math.log(momentum) if momentum > 0 else 0.0


def _weights(tensors: list[Tensor], weight: float, skipped: Tensor | None) -> list[Tensor]:
    """`weight`, or 0 where the step is skipped, in the type of each tensor."""
    made: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    for tensor in tensors:
        kind = (tensor.dtype, tensor.device)
        if kind not in made:
            made[kind] = torch.full((), weight, dtype=tensor.dtype, device=tensor.device)
            if skipped is not None:
                made[kind].masked_fill_(skipped, 0.0)
    return [made[tensor.dtype, tensor.device] for tensor in tensors]


def _pairs(teacher: list[Tensor], student: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    pairs = list(zip(teacher, student, strict=True))
    assert all(own.shape == other.shape for own, other in pairs), "teacher and student are different networks"
    return pairs
