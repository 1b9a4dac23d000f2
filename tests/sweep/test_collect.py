"""Collecting a sweep: every number against the lines that the trainings themselves have written."""

import csv
import io
import json
import math
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import REPOSITORY, assert_same_run, metrics, run
from finished_sweep import REASON, TRACEBACK, add_by_hand, add_trial, new_manifest, real_sweep, state_of
from rich.console import Console
from scipy.stats import spearmanr

from dino.sweep.collect import Results, collect
from dino.sweep.manifest import Manifest
from dino.sweep.report import terminal_report, write
from dino.sweep.states import TrialState

KNN, RANK = "val/knn_top1", "val/effective_rank"
Sweep = tuple[Manifest, dict[str, TrialState]]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return real_sweep(tmp_path_factory.getbasetemp() / "real_sweep")


@pytest.fixture(scope="module")
def written(sweep: Sweep) -> Results:
    results = collect(*sweep)
    write(results)
    return results


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def content(folder: Path) -> dict[str, Any]:
    """`results.json`, in the strict sense of JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    result: dict[str, Any] = json.loads((folder / "results.json").read_text(), parse_constant=refuse)
    return result


def logged(manifest: Manifest, position: int, metric: str) -> list[float]:
    lines = metrics(manifest.directory(manifest.trials[position]))
    return [line[metric] for line in lines if metric in line]


def means(manifest: Manifest, metric: str) -> list[float]:
    """Of the four settings that have finished, in their order."""
    return [statistics.mean(logged(manifest, first + seed, metric)[-1] for seed in (0, 1)) for first in (0, 2, 4, 6)]


def by_hand(folder: Path, points: list[tuple[dict[str, Any], list[float | None]]], **changes: Any) -> Results:
    """A sweep of finished trials: settings, and the metric for each seed; None is a value that was not finite."""
    manifest = new_manifest(folder, **changes)
    for settings, values in points:
        for seed, value in enumerate(values):
            lines = [{"step": 0, manifest.sweep["metric"]: 1.0}, {"step": 9, manifest.sweep["metric"]: value}]
            add_by_hand(manifest, settings, seed, lines)
    return collect(manifest, {trial.id: state_of(manifest, trial, "finished") for trial in manifest.trials})


def printed(results: Results, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(terminal_report(results))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# ---------------------------------------------------------------------- numbers of real trainings


def test_settings_are_mean_and_deviation_of_their_finished_seeds(sweep: Sweep, written: Results) -> None:
    manifest, _ = sweep
    lines = table(manifest.folder / "results_by_setting.csv")
    keys = [(line["loss.teacher_temp"], line["ema.momentum"]) for line in lines]
    assert keys == [(temp, momentum) for temp in ("0.02", "0.04", "0.07") for momentum in ("0.9", "0.996")]
    for position, line in enumerate(lines[:4]):
        assert (line["seeds"], line["missing"]) == ("2", "0")
        for metric in (KNN, RANK, "train/loss", "val/knn_top5"):
            pair = [logged(manifest, 2 * position + seed, metric)[-1] for seed in (0, 1)]
            assert float(line[f"{metric}_mean"]) == pytest.approx(statistics.mean(pair), rel=1e-12)
            assert float(line[f"{metric}_std"]) == pytest.approx(statistics.stdev(pair), rel=1e-12)
            assert line[f"{metric}_n"] == "2"
    for line in lines[4:]:  # failed, NaN, running, pending: none of them counts
        assert (line["seeds"], line["missing"], line[f"{KNN}_n"]) == ("2", "2", "0")
        assert (line[f"{KNN}_mean"], line[f"{KNN}_std"]) == ("", "")
    assert len({line["train/loss_mean"] for line in lines[:4]}) == 4, (
        "the settings made no difference: nothing is shown"
    )


def test_trials_have_their_last_values_and_what_became_of_them(sweep: Sweep, written: Results) -> None:
    manifest, _ = sweep
    lines = table(manifest.folder / "results.csv")
    assert [line["trial"] for line in lines] == [trial.id for trial in manifest.trials]
    for position, line in enumerate(lines[:8]):
        assert (line["state"], line["step"], line["total_steps"]) == ("finished", "12", "12")
        values = logged(manifest, position, KNN)
        assert float(line[KNN]) == values[-1]
        assert float(line[f"{KNN}_best"]) == max(values[1:]), "the untrained network is no result"
        assert float(line["train/loss"]) == logged(manifest, position, "train/loss")[-1]
        summary = json.loads((manifest.directory(manifest.trials[position]) / "training_summary.json").read_text())
        assert float(line["train_time_s"]) == summary["train_time_s"]
        assert line["commit"] == manifest.snapshots[0].commit
    failed, broken, running, pending = lines[8:]
    assert (failed["state"], failed["reason"], failed["traceback"]) == ("failed", REASON, TRACEBACK)
    assert float(failed["train/loss"]) == logged(manifest, 0, "train/loss")[2], "the cut line is left out"
    assert (broken["state"], broken["train/loss"], broken["exit_code"]) == ("NaN", "nan", "3")
    assert (running["state"], running["host"], running["train_time_s"]) == ("running", "node<1>", "")
    assert (pending["state"], pending["reason"], pending[KNN]) == ("pending", "Resources", "")


def test_json_has_the_same_numbers_and_no_nan(sweep: Sweep, written: Results) -> None:
    manifest, _ = sweep
    found = content(manifest.folder)
    assert found["states"] == {"NaN": 1, "failed": 1, "finished": 8, "pending": 1, "running": 1}
    assert [line[f"{KNN}_mean"] for line in found["settings"]][:4] == pytest.approx(means(manifest, KNN))
    assert found["trials"][9]["train/loss"] is None
    assert found["trials"][3]["train/loss"] == logged(manifest, 3, "train/loss")[-1]


def test_rankings_and_their_correlation(sweep: Sweep, written: Results) -> None:
    manifest, _ = sweep
    found = content(manifest.folder)
    settings = [manifest.trials[first].settings for first in (0, 2, 4, 6)]
    for metric in (KNN, RANK):
        values = means(manifest, metric)
        order = sorted(range(4), key=lambda position: -values[position])
        assert found["rankings"][metric] == [settings[position] for position in order]
    expected = spearmanr(means(manifest, KNN), means(manifest, RANK)).statistic
    assert found["rank_correlation"] == pytest.approx(expected)


def test_the_command_of_the_best_runs_it_again_bit_for_bit(sweep: Sweep, written: Results, tmp_path: Path) -> None:
    manifest, _ = sweep
    best = content(manifest.folder)["best"]
    values = means(manifest, KNN)
    assert best["settings"] == manifest.trials[2 * values.index(max(values))].settings
    assert best["snapshot"]["digest"] == manifest.snapshots[0].digest
    program, script, *overrides = shlex.split(best["command"])
    assert (program, script) == ("python", "train.py")
    words = [sys.executable, str(REPOSITORY / script), *overrides, f"run_dir={tmp_path / 'again'}"]
    assert run(words, cwd=tmp_path).returncode == 0
    assert_same_run(tmp_path / "again", manifest.folder / best["trial"])


def test_written_twice_the_bytes_are_the_same(sweep: Sweep, written: Results) -> None:
    manifest, states = sweep
    before = {path: path.read_bytes() for path in write(written)}
    assert {path.name for path in before} == {"results.csv", "results_by_setting.csv", "results.json", "sweep.html"}
    again = collect(manifest, states)
    assert {path: path.read_bytes() for path in write(again)} == before
    assert not list(manifest.folder.glob(".*.*")), "a temporary file is left"


def test_the_terminal_shows_all_of_it_in_80_columns(written: Results) -> None:
    text = printed(written)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "12 trials of 6 settings: 1 NaN, 1 failed, 8 finished, 1 pending, 1 running." in " ".join(text.split())
    for row in written.settings[:4]:
        assert str(row.over_seeds(KNN)) in text
    assert "2 of 2" in text
    assert "0 of 2" in text
    wide = printed(written, 400)
    assert TRACEBACK in wide
    assert REASON in wide


# ---------------------------------------------------------------------- whatever there is


def test_before_any_trial_has_begun(tmp_path: Path) -> None:
    manifest = new_manifest(tmp_path / "sweep")
    states = {}
    for seed in (0, 1):
        trial = add_trial(manifest, {"optimizer.lr": 0.1}, seed)
        states[trial.id] = state_of(manifest, trial, "pending")
    results = collect(manifest, states)
    write(results)
    assert content(manifest.folder)["best"] is None
    assert content(manifest.folder)["rankings"] == {}
    assert "2 trials of 1 setting: 2 pending. No finished trial has val/knn_top1 yet." in printed(results, 200)
    assert [line["state"] for line in table(manifest.folder / "results.csv")] == ["pending", "pending"]


def test_a_metric_that_no_trial_has_is_named_with_those_there_are(tmp_path: Path) -> None:
    results = by_hand(tmp_path / "sweep", [({"a": 1}, [4.0])])
    results.manifest.sweep["metric"] = "val/knn"
    states = {trial.id: state_of(results.manifest, trial, "finished") for trial in results.manifest.trials}
    summary = collect(results.manifest, states).summary
    assert summary.endswith("No finished trial has val/knn yet; there are val/knn_top1.")


def test_a_search_without_any_trial_yet(tmp_path: Path) -> None:
    manifest = new_manifest(tmp_path / "sweep")
    assert len(write(collect(manifest, {}))) == 4
    assert content(manifest.folder)["trials"] == []


def test_what_is_not_finite_or_missing_is_a_missing_seed(tmp_path: Path) -> None:
    results = by_hand(tmp_path / "sweep", [({"a": 1}, [None, 4.0, 6.0]), ({"a": 2}, [None]), ({"a": 3}, [7.0])])
    add_by_hand(results.manifest, {"a": 3}, 1, [{"step": 9, "train/loss": 1.0}])  # finished, and not evaluated
    states = {trial.id: state_of(results.manifest, trial, "finished") for trial in results.manifest.trials}
    results = collect(results.manifest, states)
    write(results)
    lines = table(results.manifest.folder / "results_by_setting.csv")
    assert [(line[f"{KNN}_n"], line["missing"]) for line in lines] == [("2", "1"), ("0", "1"), ("1", "1")]
    assert [line[f"{KNN}_mean"] for line in lines] == ["5.0", "", "7.0"]
    assert float(lines[0][f"{KNN}_std"]) == pytest.approx(math.sqrt(2))
    assert lines[2][f"{KNN}_std"] == "", "one value has no deviation"
    assert table(results.manifest.folder / "results.csv")[0][KNN] == "nan"
    assert content(results.manifest.folder)["trials"][0][KNN] is None
    assert results.best is not None
    assert results.best.values == {"a": 3}


def test_a_metric_may_be_better_low(tmp_path: Path) -> None:
    points: list[tuple[dict[str, Any], list[float | None]]] = [({"a": v}, [v, v + 2]) for v in (3.0, 1.0, 2.0)]
    results = by_hand(tmp_path / "sweep", points, metric="val/loss", direction="minimize")
    assert [setting.values["a"] for setting in results.rankings["val/loss"]] == [1.0, 2.0, 3.0]
    assert results.best_row is not None
    assert results.best_row.last["val/loss"] == 1.0
    assert "Best val/loss [nats]: 2 ± 1.4 (2 seeds) with a=1.0." in results.summary


@pytest.mark.parametrize(
    "settings",
    [
        [{"backbone": name} for name in ("vit_s16", "resnet50")],
        [{"a": a, "b": b, "c": c} for a in (1, 2) for b in (0.1, 10) for c in ("x", "y")],
        [{"a": 0.1, "b": 0.9}, {"a": 0.01, "b": 0.99}, {"a": 0.001, "b": 0.999}],  # together
        [{}],
        [{"a": None}, {"a": 2}, {"a": "auto"}, {"a": [1, 2]}, {"a": True}],
    ],
    ids=["names", "three axes", "zipped", "seeds only", "of every kind"],
)
def test_axes_of_every_kind(tmp_path: Path, settings: list[dict[str, Any]]) -> None:
    results = by_hand(tmp_path / "sweep", [(each, [50.0 + n, 52.0 + n]) for n, each in enumerate(settings)])
    write(results)
    assert results.best is not None
    assert results.best.values == settings[-1]
    assert len(results.settings) == len(settings)
    assert content(tmp_path / "sweep")["best"]["settings"] == settings[-1]
    lines = table(tmp_path / "sweep" / "results_by_setting.csv")
    assert sorted(line[f"{KNN}_mean"] for line in lines) == [str(51.0 + n) for n in range(len(settings))]


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_rank_correlation_with_ties(tmp_path: Path, direction: str) -> None:
    values, ranks = [3.0, 1.0, 3.0, 2.0, 2.0], [10.0, 11.0, 14.0, 14.0, 12.0]
    manifest = new_manifest(tmp_path / "sweep", direction=direction)
    for position, (value, rank) in enumerate(zip(values, ranks, strict=True)):
        add_by_hand(manifest, {"a": position}, 0, [{"step": 1, KNN: value, RANK: rank}])
    states = {trial.id: state_of(manifest, trial, "finished") for trial in manifest.trials}
    sign = 1 if direction == "maximize" else -1
    expected = sign * spearmanr(values, ranks).statistic
    assert collect(manifest, states).rank_correlation == pytest.approx(expected)
    del manifest.trials[2:]
    assert collect(manifest, states).rank_correlation is None, "two settings say nothing"


def test_numbers_sort_by_size(tmp_path: Path) -> None:
    results = by_hand(tmp_path / "sweep", [({"lr": value}, [1.0]) for value in (10, 9, 1e-05, 0.1)])
    assert [setting.values["lr"] for setting in results.settings] == [1e-05, 0.1, 9, 10]
