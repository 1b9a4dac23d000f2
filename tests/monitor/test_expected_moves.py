"""The marks at which the loss is expected to move: against every value of the schedules."""

from dataclasses import dataclass
from typing import Any

import pytest

from dino.monitor import expected_moves
from dino.schedule import Constant, Cosine, CosineRestarts, Schedule, ThreePhase

EPOCHS, STEPS_PER_EPOCH = 12, 7
SPAN: dict[str, Any] = {"epochs": EPOCHS, "steps_per_epoch": STEPS_PER_EPOCH}
TOTAL = EPOCHS * STEPS_PER_EPOCH


@dataclass(frozen=True)
class Moving:
    lr: Schedule
    teacher_temp: Schedule


STILL = Constant(base=0.04, **SPAN)
RATES: dict[str, Schedule] = {
    "no warm-up": Cosine(base=1.0, final=0.1, **SPAN),
    "warm-up": Cosine(base=1.0, final=0.1, warmup_epochs=3, **SPAN),
    "three phases": ThreePhase(base=1.0, final=0.1, **SPAN),
    "restarts": CosineRestarts(base=1.0, final=0.1, warmup_epochs=2, num_cycles=3, **SPAN),
    "restarts, lower each time": CosineRestarts(base=1.0, final=0.1, num_cycles=4, decay=0.5, **SPAN),
}


def steps_of(moving: Moving, cause: str, frozen: int = 0) -> list[int]:
    found = expected_moves(moving, frozen, TOTAL)
    return [step for step, moves in found.items() for move in moves if move.cause == cause]


@pytest.mark.parametrize("name", RATES)
def test_peaks_of_the_learning_rate_are_those_of_its_values(name: str) -> None:
    rates = [RATES[name](step) for step in range(TOTAL)]
    # The base comes twice after a warm-up; the first of equal values is where the rise has ended.
    peaks = [step for step in range(1, TOTAL - 1) if rates[step - 1] < rates[step] >= rates[step + 1]]
    assert steps_of(Moving(RATES[name], STILL), "lr_peak") == peaks
    assert peaks or name == "no warm-up"


@pytest.mark.parametrize(("warmup_epochs", "per"), [(0, "epoch"), (1, "epoch"), (5, "epoch"), (5, "step")])
def test_the_temperature_has_come_to_the_end_of_its_warm_up(warmup_epochs: int, per: Any) -> None:
    schedule = Constant(base=0.07, warmup_start=0.04, warmup_epochs=warmup_epochs, per=per, **SPAN)
    values = [schedule(step) for step in range(TOTAL)]
    changes = [step for step in range(1, TOTAL) if values[step] != values[step - 1]]
    found = steps_of(Moving(RATES["no warm-up"], schedule), "teacher_temp_warmup_end")
    if warmup_epochs < 2:  # of a single epoch both ends of the warm-up are the same value, and no end
        assert found == []
    else:
        assert found == changes[-1:]
        assert values[found[0]] == 0.07


def test_a_warm_up_between_equal_values_moves_nothing() -> None:
    schedule = Constant(base=0.04, warmup_start=0.04, warmup_epochs=5, per="epoch", **SPAN)
    assert steps_of(Moving(RATES["no warm-up"], schedule), "teacher_temp_warmup_end") == []


def test_the_last_layer_is_unfrozen_once_and_within_the_run() -> None:
    moving = Moving(RATES["warm-up"], STILL)
    assert steps_of(moving, "last_layer_unfrozen", frozen=14) == [14]
    assert steps_of(moving, "last_layer_unfrozen", frozen=0) == []
    assert steps_of(moving, "last_layer_unfrozen", frozen=TOTAL) == []


def test_several_moves_at_one_step_are_all_named() -> None:
    found = expected_moves(Moving(RATES["warm-up"], STILL), 20, TOTAL)
    assert [move.cause for move in found[20]] == ["last_layer_unfrozen", "lr_peak"]
