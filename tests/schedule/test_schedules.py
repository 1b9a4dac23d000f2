"""The schedules: the original's arrays, the ends and shapes of each, and what is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dino.schedule import (
    Constant,
    Cosine,
    CosineRestarts,
    Linear,
    Polynomial,
    Schedule,
    ThreePhase,
    scaled_lr,
)

SPAN = {"epochs": 10, "steps_per_epoch": 10}
MOVING = [Cosine, Linear, Polynomial, CosineRestarts]


def values(schedule: Schedule) -> list[float]:
    return [schedule(step) for step in range(schedule.total_steps)]


def test_values_equal_the_originals_arrays(reference: Callable[[str], dict[str, Any]]) -> None:
    arrays = reference("schedules.npz")
    for setting in reference("meta.json")["schedules"]["schedules"]:
        schedule = Cosine(
            base=setting["base"],
            final=setting["final"],
            warmup_epochs=setting["warmup"],
            epochs=setting["epochs"],
            steps_per_epoch=setting["niter"],
        )
        np.testing.assert_allclose(values(schedule), arrays[setting["name"]], rtol=1e-12)


def test_values_equal_the_golden_run(reference: Callable[[str], dict[str, Any]]) -> None:
    golden = reference("golden.json")["sched"]
    span = {"epochs": 4, "steps_per_epoch": 5}
    np.testing.assert_allclose(
        values(Cosine(base=1.25e-4, final=1e-6, warmup_epochs=1, **span)), golden["lr"], rtol=1e-12
    )
    np.testing.assert_allclose(values(Cosine(base=0.04, final=0.4, **span)), golden["wd"], rtol=1e-12)
    np.testing.assert_allclose(values(Cosine(base=0.996, final=1.0, **span)), golden["mom"], rtol=1e-12)


def test_published_checks_of_the_learning_rate() -> None:
    span = {"epochs": 100, "steps_per_epoch": 10}
    lr = Cosine(base=scaled_lr(0.0005, 512), final=1e-6, warmup_epochs=10, **span)
    assert lr(0) == 0
    assert lr(1) == pytest.approx(1.0101e-5, rel=1e-4)
    assert lr(99) == lr(100) == 1e-3
    assert lr(999) == pytest.approx(1.00304e-6, rel=1e-5)
    assert Cosine(base=0.04, final=0.4, **span)(999) == pytest.approx(0.39999911, rel=1e-7)
    assert Cosine(base=0.996, final=1.0, **span)(999) == pytest.approx(0.99999999, rel=1e-9)


def test_lr_is_scaled_by_the_effective_batch() -> None:
    assert scaled_lr(0.0005, 1024) == pytest.approx(0.002)
    assert scaled_lr(0.0005, 64, reference_batch=128) == pytest.approx(0.00025)


def test_teacher_temperature_warms_up_by_epoch_as_the_original() -> None:
    temp = Constant(
        base=0.07, warmup_start=0.04, warmup_epochs=30, per="epoch", domain="positive", epochs=100, steps_per_epoch=7
    )
    assert [temp(epoch * 7) for epoch in (0, 29, 30, 99)] == [0.04, 0.07, 0.07, 0.07]
    assert temp(7) == pytest.approx(0.0410345, rel=1e-6)
    assert temp(28 * 7) == pytest.approx(0.0689655, rel=1e-6)
    assert {temp(step) for step in range(7, 14)} == {temp(7)}  # the same throughout an epoch


def test_linear_warmup_is_an_inclusive_linspace() -> None:
    schedule = Constant(base=0.7, warmup_start=0.1, warmup_epochs=1.5, **SPAN)
    np.testing.assert_allclose(values(schedule)[:15], np.linspace(0.1, 0.7, 15), rtol=1e-14)
    assert schedule(14) == schedule(15) == schedule(99) == 0.7


def test_cosine_warmup_starts_and_ends_flat() -> None:
    warmup = values(Constant(base=2.0, warmup_start=1.0, warmup_epochs=1, warmup="cosine", **SPAN))[:10]
    assert (warmup[0], warmup[9]) == (1.0, 2.0)
    steps = np.diff(warmup)
    assert (steps > 0).all()
    assert steps[4] > 2 * steps[0]
    assert steps[4] > 2 * steps[-1]
    assert warmup[3] == pytest.approx(1.25)  # (1 - cos(pi / 3)) / 2


def test_a_warmup_of_one_step_is_its_start() -> None:
    assert values(Constant(base=1.0, warmup_start=0.25, warmup_epochs=0.1, **SPAN))[:2] == [0.25, 1.0]


@pytest.mark.parametrize("schedule", MOVING)
def test_ends(schedule: Any) -> None:
    moving = schedule(base=1.0, final=0.1, warmup_start=0.2, warmup_epochs=2, **SPAN)
    assert (moving(0), moving(19), moving(20)) == (0.2, 1.0, 1.0)
    assert 0.1 < moving(99) < 0.2  # towards `final`, reached one step after the run
    assert moving(100) == moving(10_000) == moving(99)


@pytest.mark.parametrize("schedule", [Cosine, Linear, Polynomial])
@pytest.mark.parametrize("final", [0.1, 3.0])
def test_they_move_one_way(schedule: Any, final: float) -> None:
    differences = np.diff(values(schedule(base=1.0, final=final, **SPAN)))
    assert (differences * np.sign(final - 1) > 0).all()


def test_linear_and_polynomial_formulas() -> None:
    assert Linear(base=1.0, final=0.0, **SPAN)(25) == pytest.approx(0.75)
    assert Polynomial(base=1.0, final=0.2, power=3, **SPAN)(50) == pytest.approx(0.2 + 0.8 / 8)
    linear, power_1 = Linear(base=1.0, final=0.2, **SPAN), Polynomial(base=1.0, final=0.2, power=1, **SPAN)
    assert values(linear) == pytest.approx(values(power_1))


def test_cosine_restarts_with_decay() -> None:
    schedule = CosineRestarts(base=1.0, final=0.2, num_cycles=4, decay=0.5, warmup_epochs=2, **SPAN)
    peaks = [schedule(20 + 20 * cycle) for cycle in range(4)]
    assert peaks == pytest.approx([1.0, 0.6, 0.4, 0.3])
    run = values(schedule)
    rises = [step for step in range(21, 100) if run[step] > run[step - 1]]
    assert rises == [40, 60, 80]
    assert schedule(30) == pytest.approx(0.6)  # halfway down the first wave
    one = values(CosineRestarts(base=1.0, final=0.2, num_cycles=1, warmup_epochs=2, **SPAN))
    assert one == values(Cosine(base=1.0, final=0.2, warmup_epochs=2, **SPAN))


def test_three_phases() -> None:
    run = values(ThreePhase(base=1.0, final=0.01, **SPAN))
    np.testing.assert_allclose(run[:10], np.linspace(0, 1, 10))
    assert run[10] == 1.0
    assert run[45] == pytest.approx(0.505)  # halfway through the cosine
    assert (np.diff(run[10:81]) < 0).all()
    assert run[79] > 0.01
    assert run[80:] == [0.01] * 20


def test_a_run_of_warmup_only() -> None:
    assert Cosine(base=1.0, final=0.0, warmup_epochs=10, **SPAN)(99) == 1.0
    assert ThreePhase(base=1.0, final=0.0, warmup_fraction=1.0, cosine_fraction=0.0, **SPAN)(99) == 1.0


@pytest.mark.parametrize("per", ["step", "epoch"])
def test_a_warmup_longer_than_the_run_is_refused(per: Any) -> None:
    message = r"schedule\.lr\.warmup_epochs=30 is longer than the run of 10 epochs: use at most 10"
    with pytest.raises(ValueError, match=message):
        Cosine(base=1.0, final=0.0, warmup_epochs=30, per=per, name="schedule.lr", **SPAN)


@pytest.mark.parametrize(
    ("schedule", "wrong", "message"),
    [
        (Constant, {"base": 0.0, "domain": "positive"}, r"x\.base=0\.0: use a number above 0"),
        (Constant, {"warmup_start": -1.0, "warmup_epochs": 1}, r"x\.warmup_start=-1\.0: use a number 0 or more"),
        (Constant, {"warmup_epochs": -1}, r"x\.warmup_epochs=-1: use 0 or more"),
        (Constant, {"warmup": "square"}, r"x\.warmup=square: use linear or cosine"),
        (Constant, {"per": "year"}, r"x\.per=year: use step or epoch"),
        (Constant, {"epochs": 0}, r"x\.epochs=0: use"),
        (Constant, {"base": float("nan")}, r"x\.base=nan: use"),
        (Cosine, {"final": 1.2, "domain": "unit"}, r"x\.final=1\.2: use a number from 0 to 1"),
        (Polynomial, {"final": 0.0, "power": 0.0}, r"x\.power=0\.0: use a number above 0"),
        (CosineRestarts, {"final": 0.0, "num_cycles": 0}, r"x\.num_cycles=0: use"),
        (CosineRestarts, {"final": 0.0, "decay": 1.5}, r"x\.decay=1\.5: use"),
        (ThreePhase, {"final": 0.0, "warmup_fraction": -0.1}, r"x\.warmup_fraction=-0\.1: use a number from 0 to 1"),
        (ThreePhase, {"final": 0.0, "warmup_fraction": 0.5}, r"x\.cosine_fraction=0\.7 .* use .* at most 0\.5"),
    ],
)
def test_wrong_values_are_refused_by_name(schedule: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(**{"base": 1.0, "name": "x", **SPAN, **wrong})
