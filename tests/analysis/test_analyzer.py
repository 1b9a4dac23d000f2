"""What is said of runs made by hand, whose right analysis is known."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade_run import LN_K, Curve, expected_move, healthy, over, run_directory, verdict

from dino.analysis import Analysis, History, analyse

LOSS, KNN = "train/loss", "val/knn_top1"


def analysis_of(folder: Path, **settings: Any) -> Analysis:
    return analyse(History.load(run_directory(folder / "run", **settings)))


def kinds(analysis: Analysis) -> list[str]:
    return [anomaly.kind for anomaly in analysis.anomalies]


def with_jumps(name: str, steps: Mapping[int, float]) -> dict[str, Curve]:
    """The healthy curve, multiplied at some steps."""
    return {name: lambda step: (healthy(step)[name] or 0.0) * steps.get(step, 1.0)}


# ---------------------------------------------------------------------- does it learn


def test_a_healthy_run_has_nothing_to_say(tmp_path: Path) -> None:
    analysis = analysis_of(tmp_path, events=[expected_move(100)])
    assert analysis.learning == "learns"
    assert analysis.score == 1
    assert analysis.deductions == analysis.anomalies == analysis.verdicts == analysis.recommendations == []
    assert analysis.headline["k-NN"].endswith("(untrained 46.7 %); raw pixels 97.5 %")
    assert analysis.headline["Loss"].endswith(f"% of ln K = {LN_K:.2f})")


@pytest.mark.parametrize(
    ("settings", "learning", "words"),
    [
        ({"steps": 50}, "not yet known", "no evaluation"),
        ({"changes": {"val/knn_top1": lambda step: 46.0}}, "does not learn", "k-NN 46.0 % (untrained 46.0 %)"),
        ({"changes": {"val/knn_top1": lambda step: 46.0}, "steps": 200, "state": "running"}, "not yet known", "early"),
        ({"changes": {"val/knn_top1": lambda step: math.nan}}, "learns", "Effective rank"),
        (
            {"events": [verdict(950, "constant_collapse", severe=True), over(960, "constant_collapse")]},
            "learns",
            "k-NN",
        ),
        ({"events": [verdict(950, "constant_collapse", severe=True)]}, "collapsed", "steps 950 to 1000"),
        ({"events": [verdict(950, "loss_explosion", severe=True)], "steps": 960}, "diverged", "loss explosion"),
        ({"events": [verdict(950, "uniform_collapse", severe=True)], "steps": 960}, "collapsed", "uniform collapse"),
        ({"events": [verdict(950, "uniform_collapse", severe=False)], "steps": 960}, "learns", "k-NN"),
        ({"events": [verdict(950, "plateau", severe=True)], "steps": 960}, "learns", "k-NN"),
    ],
    ids=[
        "new",
        "no better",
        "early",
        "no labels",
        "recovered",
        "not recovered",
        "diverged",
        "collapsed",
        "a warning",
        "no collapse",
    ],
)
def test_whether_it_learns(tmp_path: Path, settings: dict[str, Any], learning: str, words: str) -> None:
    analysis = analysis_of(tmp_path, **settings)
    assert analysis.learning == learning
    assert words in analysis.because


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("finished", "finished at step 300 of 1000"),
        ("running", "died without a word at step 300 of 1000"),
        ("preempted", "was preempted at step 300 of 1000: SIGTERM"),
        ("failed", "failed at step 300 of 1000: SIGTERM"),
        ("created", "not begun"),
    ],
)
def test_the_state_in_words(tmp_path: Path, state: str, words: str) -> None:
    reason = "SIGTERM" if state in ("preempted", "failed") else None
    assert words in analysis_of(tmp_path, steps=300, state=state, reason=reason).state


@pytest.mark.parametrize(
    ("saved", "words"),
    [(True, "The same command goes on from its newest checkpoint."), (False, "The same command begins anew")],
)
def test_what_the_same_command_would_do(tmp_path: Path, saved: bool, words: str) -> None:
    analysis = analysis_of(tmp_path, steps=300, state="preempted", reason="SIGTERM")
    checkpoint = analysis.history.directory / "checkpoints" / "step_00000300.pt"
    checkpoint.parent.mkdir(exist_ok=True)
    checkpoint.unlink(missing_ok=True)
    if saved:
        checkpoint.touch()
    assert words in analyse(History.load(analysis.history.directory)).state


def test_a_run_with_a_status_alone(tmp_path: Path) -> None:
    run_dir = run_directory(tmp_path / "run", steps=0, state="created")
    for name in ("metrics.jsonl", "config.yaml"):
        (run_dir / name).unlink()
    analysis = analyse(History.load(run_dir))
    assert analysis.learning == "not yet known"
    assert analysis.score is None
    assert analysis.headline == {}
    assert analysis.statistics == analysis.correlations == analysis.recommendations == []


# ---------------------------------------------------------------------- what stands out


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (with_jumps(LOSS, {400: 4.0, 402: 3.0, 800: 3.0}), {"loss_spikes": [400, 800]}),
        (with_jumps("train/grad_norm", {500: 300.0}), {"gradient_spikes": [500]}),
        ({"train/center_norm": lambda step: 1.0 if step <= 700 else 1.0 + step - 700}, {"center_explosion": [710]}),
        ({"train/entropy_batch_mean": lambda step: 4.5 if step < 600 else 0.01}, {"entropy_collapse": [600]}),
        ({"perf/data_wait_s": lambda step: 0.02}, {"data_wait": []}),
        ({"perf/step_time_s": lambda step: 0.3 if step % 10 == 0 else 0.03}, {"slow_steps": list(range(10, 1001, 10))}),
        ({"perf/step_time_s": lambda step: 3.0 if step == 2 else 0.03}, {}),
    ],
    ids=["loss", "gradient", "center", "entropy", "data", "slow", "first step"],
)
def test_anomalies_are_found_where_they_are(
    tmp_path: Path, changes: dict[str, Curve], expected: dict[str, list[int]]
) -> None:
    found = analysis_of(tmp_path, changes=changes).anomalies
    assert {anomaly.kind: anomaly.steps for anomaly in found} == expected


def test_a_jump_where_the_loss_is_expected_to_move_is_none(tmp_path: Path) -> None:
    jumps = with_jumps(LOSS, {402: 4.0, 800: 4.0})
    (anomaly,) = analysis_of(tmp_path, changes=jumps, events=[expected_move(400)]).anomalies
    assert anomaly.steps == [800]


# ---------------------------------------------------------------------- statistics and correlations


def test_statistics_are_numpys(tmp_path: Path) -> None:
    analysis = analysis_of(tmp_path)
    values = analysis.history.series(LOSS).values
    statistic = next(each for each in analysis.statistics if each.name == LOSS)
    assert (statistic.first, statistic.last) == (values[0], values[-1])
    expected = (np.mean(values), np.std(values), np.min(values), np.max(values))
    assert (statistic.mean, statistic.std, statistic.min, statistic.max) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda step: 5.0 - step / 1000, "falls by 1 nats per 1000 steps"),
        (lambda step: 1.0 + step / 500, "rises by 2 nats per 1000 steps"),
        (lambda step: 3.0, "level"),
    ],
    ids=["falls", "rises", "level"],
)
def test_the_trend_in_words(tmp_path: Path, loss: Curve, words: str) -> None:
    analysis = analysis_of(tmp_path, changes={LOSS: loss})
    assert next(each for each in analysis.statistics if each.name == LOSS).direction == words


@pytest.mark.parametrize(
    ("first", "second", "value", "words"),
    [
        (LOSS, "train/kl_teacher_student", 1, "moves with"),
        ("train/entropy_teacher", "train/teacher_temp", -1, "sharper"),
        ("val/knn_top1", "val/effective_rank", 1, "without labels"),
        ("val/knn_top1", LOSS, 1, "no measure of progress"),
        ("train/center_norm", "train/entropy_batch_mean", -1, "less evenly"),
    ],
)
def test_pairs_that_matter(tmp_path: Path, first: str, second: str, value: float, words: str) -> None:
    changes: dict[str, Curve] = {first: lambda step: step, second: lambda step: value * step**2}
    found = {(each.first, each.second): each for each in analysis_of(tmp_path, changes=changes).correlations}
    assert found[first, second].value == pytest.approx(value)
    assert words in found[first, second].text


def test_what_does_not_move_has_no_correlation(tmp_path: Path) -> None:
    pairs = [(each.first, each.second) for each in analysis_of(tmp_path).correlations]
    assert ("train/entropy_teacher", "train/teacher_temp") not in pairs, "the temperature is constant"
    assert analysis_of(tmp_path / "new", steps=10).correlations == []


# ---------------------------------------------------------------------- score


@pytest.mark.parametrize(
    ("settings", "points", "reason"),
    [
        (
            {"events": [verdict(960, "uniform_collapse", severe=True)], "steps": 970},
            0.5,
            "uniform collapse (steps 960 to 970)",
        ),
        (
            {"events": [verdict(300, "uniform_collapse", severe=True), over(400, "uniform_collapse")]},
            0.15,
            "learned nevertheless",
        ),
        ({"events": [verdict(300, "plateau", severe=False)]}, 0.15, "plateau"),
        ({"events": [{"step": 7, "event": "skipped_step", "text": "NaN"}]}, 0.05, "1 step was skipped"),
        ({"events": [{"step": s, "event": "skipped_step", "text": "NaN"} for s in range(20)]}, 0.3, "20 steps"),
        ({"changes": {"val/knn_top1": lambda step: 46.0}}, 0.4, "k-NN top-1 is no better"),
        ({"changes": {"val/effective_rank_ratio": lambda step: 0.5}}, 0.2, "effective rank ratio is no better"),
        (
            {"changes": {"val/knn_top1": lambda step: {0: 40.0, 500: 90.0}.get(step, 70.0)}},
            0.1,
            "was 90.0 % at step 500",
        ),
        ({"changes": with_jumps(LOSS, {400: 4.0, 800: 4.0})}, 0.06, "the loss jumped 2 times: steps 400, 800"),
        ({"state": "failed"}, 0.1, "the run failed"),
        ({"state": "running", "steps": 600}, 0.05, "the run died"),
    ],
)
def test_each_point_lost_has_its_reason(tmp_path: Path, settings: dict[str, Any], points: float, reason: str) -> None:
    analysis = analysis_of(tmp_path, **settings)
    (deduction,) = analysis.deductions
    assert deduction.points == pytest.approx(points)
    assert reason in deduction.reason
    assert analysis.score == pytest.approx(1 - points)


def test_the_score_ends_at_zero_and_the_worst_comes_first(tmp_path: Path) -> None:
    events = [verdict(step, kind, severe=True) for step, kind in ((950, "non_finite"), (955, "uniform_collapse"))]
    changes = {"val/knn_top1": lambda step: 46.0}
    analysis = analysis_of(tmp_path, steps=960, events=events, changes=changes)
    points = [each.points for each in analysis.deductions]
    assert points == sorted(points, reverse=True)
    assert sum(points) > 1
    assert analysis.score == 0


# ---------------------------------------------------------------------- what to change


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [
        ("uniform_collapse", {}, ["loss.teacher_temp=0.04: try 0.02", "loss.warmup_teacher_temp=0.04: try 0.02"]),
        (
            "uniform_collapse",
            {"ema": {"momentum": 1.0}},
            ["loss.teacher_temp", "loss.warmup_teacher_temp", "ema.momentum=1.0: try 0.999"],
        ),
        (
            "constant_collapse",
            {"loss": {"center_momentum": 1.0}},
            ["loss.center_momentum=1.0: try 0.9", "loss.koleo_weight=0.0: try 0.1", "optimizer.lr=0.024: try 0.012"],
        ),
        (
            "gradient_explosion",
            {"trainer": {"clip_norm": None}},
            ["trainer.clip_norm=null: try 3.0", "optimizer.lr=0.024: try 0.008"],
        ),
        ("oscillation", {}, ["optimizer.lr=0.024: try 0.012", "ema.momentum=0.996: try 0.998"]),
        ("something_new", {}, []),
    ],
)
def test_a_verdict_names_the_key_its_value_and_a_proposal(
    tmp_path: Path, kind: str, config: dict[str, Any], expected: Sequence[str]
) -> None:
    events = [verdict(300, kind, severe=True), verdict(400, kind, severe=True, count=2)]
    found = [str(each) for each in analysis_of(tmp_path, events=events, config=config).recommendations]
    assert len(found) == len(expected)
    assert all(words in line for words, line in zip(expected, found, strict=True))


def test_waiting_for_data_asks_for_workers(tmp_path: Path) -> None:
    (found,) = analysis_of(tmp_path, changes={"perf/data_wait_s": lambda step: 0.02}).recommendations
    assert str(found).startswith("dataset.num_workers=0: try 2")


def test_a_run_that_does_not_learn_is_told_what_to_try(tmp_path: Path) -> None:
    found = analysis_of(tmp_path, changes={KNN: lambda step: 46.0}).recommendations
    assert [str(each).partition(" (")[0] for each in found] == [
        "trainer.epochs=100: try 200",
        "loss.teacher_temp=0.04: try 0.02",
    ]


def test_verdicts_of_a_kind_are_one(tmp_path: Path) -> None:
    events = [verdict(200, "plateau", severe=False), verdict(300, "uniform_collapse", severe=True, text="first")]
    events += [verdict(600, "uniform_collapse", severe=True, count=9, text="second"), over(700, "uniform_collapse")]
    one, two = analysis_of(tmp_path, events=events).verdicts
    assert (one.kind, one.count, one.first_step, one.last_step, one.text) == ("uniform_collapse", 9, 300, 700, "second")
    assert one.when == "steps 300 to 700"
    assert (two.kind, two.severe, two.when) == ("plateau", False, "step 200")
