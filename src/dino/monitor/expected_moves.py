"""The steps at which the loss is expected to move, so that nobody takes what follows for a success or a failure."""

from dataclasses import dataclass
from typing import Protocol

from dino.schedule import Schedule


class MovingParts(Protocol):
    """The schedules whose corners move the loss."""

    @property
    def lr(self) -> Schedule: ...

    @property
    def teacher_temp(self) -> Schedule: ...


@dataclass(frozen=True)
class ExpectedMove:
    cause: str
    text: str


def expected_moves(
    schedules: MovingParts, freeze_last_layer_steps: int, total_steps: int, freeze_backbone_steps: int = 0
) -> dict[int, list[ExpectedMove]]:
    """Step -> what changes there: that many steps have been made, the next one is the first with the change."""
    found: list[tuple[int, ExpectedMove]] = []
    if freeze_last_layer_steps:
        text = "the last layer learns from here on: the loss is expected to move"
        found.append((freeze_last_layer_steps, ExpectedMove("last_layer_unfrozen", text)))
    if freeze_backbone_steps:
        text = "the backbone learns from here on: the loss is expected to move"
        found.append((freeze_backbone_steps, ExpectedMove("backbone_unfrozen", text)))
    for step in schedules.teacher_temp.rises():
        temperature = schedules.teacher_temp(step)
        text = (
            f"the teacher temperature has come to {temperature:g}, the end of its warm-up: the loss is expected to move"
        )
        found.append((step, ExpectedMove("teacher_temp_warmup_end", text)))
    for step in schedules.lr.rises():
        text = f"the learning rate is at its peak of {schedules.lr(step):.3g}: the loss is expected to move"
        found.append((step, ExpectedMove("lr_peak", text)))
    moves: dict[int, list[ExpectedMove]] = {}
    for step, move in sorted(found, key=lambda pair: pair[0]):
        if 0 < step < total_steps:
            moves.setdefault(step, []).append(move)
    return moves
