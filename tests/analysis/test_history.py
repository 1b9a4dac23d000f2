"""What is read from a run directory, whatever state it is in."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from handmade_run import run_directory, verdict

from dino.analysis import History
from dino.analysis.history import labels


def test_series_are_what_was_logged(tmp_path: Path) -> None:
    history = History.load(run_directory(tmp_path / "run", steps=20))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("train/loss", "val/knn_top1", "grad/head.mlp/norm"):
        logged = [(line["step"], line[name]) for line in lines if name in line]
        series = history.series(name)
        assert list(zip(series.steps, series.values, strict=True)) == logged
        assert name in history.names
    assert history.last("train/loss") == lines[-1]["train/loss"]
    assert history.untrained("val/knn_top1") == 46.7
    assert len(history.series("train/unknown")) == 0
    assert history.last("train/unknown") is None


def test_an_epoch_is_the_mean_of_its_steps(tmp_path: Path) -> None:
    loss = {"train/loss": lambda step: float(step)}
    series = History.load(run_directory(tmp_path / "run", steps=20, changes=loss)).series("train/loss", per="epoch")
    assert series.steps.tolist() == [1, 2]
    assert series.values.tolist() == [np.mean([2, 4, 6, 8, 10]), np.mean([12, 14, 16, 18, 20])]


def test_a_dataframe_has_a_row_a_step_and_a_column_a_metric(tmp_path: Path) -> None:
    history = History.load(run_directory(tmp_path / "run", steps=100))
    frame = history.to_dataframe()
    assert frame.index.tolist() == list(range(0, 101, 2))
    assert list(frame.columns) == history.names
    assert frame["train/loss"].dropna().tolist() == history.series("train/loss").values.tolist()
    assert frame.loc[100, "val/knn_top1"] == history.last("val/knn_top1"), "both lines of this step are in its row"
    assert math.isnan(frame.loc[50, "val/knn_top1"])
    assert history.to_dataframe(per="epoch").index.tolist() == list(range(11))


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    changes = {"train/loss": lambda step: None if step == 10 else 1.0}
    series = History.load(run_directory(tmp_path / "run", steps=20, changes=changes)).series("train/loss")
    assert series.steps[np.isnan(series.values)].tolist() == [10]
    assert len(series.finite) == len(series) - 1


def test_events_keep_their_details(tmp_path: Path) -> None:
    events = [verdict(50, "plateau", severe=False, text="level for long")]
    history = History.load(run_directory(tmp_path / "run", steps=100, events=events))
    (event,) = history.named("verdict")
    assert (event.step, event.text, event.details["verdict"]) == (50, "level for long", "plateau")
    assert all("event" not in line for line in history.lines)


def test_a_figure_can_be_had(tmp_path: Path) -> None:
    history = History.load(run_directory(tmp_path / "run", steps=100))
    (axes,) = history.plot("train/loss", "train/entropy_teacher").axes
    assert [line.get_label() for line in axes.lines] == ["loss", "entropy teacher"]


@pytest.mark.parametrize("kept", ["status.json", "metrics.jsonl", "config.yaml"])
def test_one_file_is_enough(tmp_path: Path, kept: str) -> None:
    run_dir = run_directory(tmp_path / "run", steps=100)
    for path in run_dir.iterdir():
        if path.name != kept:
            path.unlink()
    history = History.load(run_dir)
    assert history.step == (0 if kept == "config.yaml" else 100)


def test_damaged_files_count_as_missing(tmp_path: Path) -> None:
    run_dir = run_directory(tmp_path / "run", steps=100)
    whole = len(History.load(run_dir).lines)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"train/loss": 1.0}\n{"step": 101, "train/lo')
    (run_dir / "status.json").write_text("{")
    (run_dir / "config.yaml").write_text("loss: [")
    history = History.load(run_dir)
    assert len(history.lines) == whole
    assert (history.status, history.config, history.state) == ({}, {}, "unknown")


@pytest.mark.parametrize("exists", [True, False])
def test_what_is_no_run_is_refused(tmp_path: Path, exists: bool) -> None:
    directory = tmp_path if exists else tmp_path / "absent"
    with pytest.raises(ValueError, match="not the directory of a run") as refused:
        History.load(directory)
    assert str(directory) in str(refused.value)


@pytest.mark.parametrize(("host", "state"), [(None, "died"), ("elsewhere", "running")])
def test_a_run_that_says_running_is_believed_where_it_cannot_be_asked(
    tmp_path: Path, host: str | None, state: str
) -> None:
    known = {} if host is None else {"host": host}
    assert History.load(run_directory(tmp_path / "run", steps=20, state="running", **known)).state == state


def test_runs_beside_each_other_have_names_of_their_own(tmp_path: Path) -> None:
    one, two = (History.load(run_directory(tmp_path / parent / "run", steps=2)) for parent in "ab")
    other = History.load(run_directory(tmp_path / "other", steps=2))
    assert labels([one, other]) == ["run", "other"]
    assert labels([one, two]) == [str(one.directory), str(two.directory)]
