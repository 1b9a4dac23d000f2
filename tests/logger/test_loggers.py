"""Loggers: JSON lines that survive a crash, plain lines without a terminal."""

import json
import resource
import time
from pathlib import Path

import pytest

from dino.logger import Console, JSONLinesLogger, RunContext
from dino.logger.json_lines import read_lines


def context(folder: Path, first_step: int = 0) -> RunContext:
    return RunContext(run_dir=folder, first_step=first_step, total_steps=10, steps_per_epoch=4)


def write(folder: Path, steps: list[int], value: float, state: dict[str, int] | None = None) -> dict[str, int]:
    """Logs `steps`, in a run resumed from `state` where given; returns the state after the last of them."""
    logger = JSONLinesLogger()
    if state is not None:
        logger.load_state_dict(state)
    logger.start(context(folder, steps[0]))
    for step in steps:
        logger.log(step, {"train/loss": value})
    state = logger.state_dict()
    logger.close()
    return state


def test_lines_hold_step_epoch_time_and_metrics(tmp_path: Path) -> None:
    write(tmp_path, [0, 6], 1.5)
    first, second = read_lines(tmp_path / "metrics.jsonl")
    assert (first["step"], first["epoch"], first["train/loss"]) == (0, 0.0, 1.5)
    assert (second["step"], second["epoch"]) == (6, 1.5)
    assert second["time"] >= first["time"]


def test_non_finite_values_become_null(tmp_path: Path) -> None:
    write(tmp_path, [1], float("nan"))
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["train/loss"] is None


def test_a_resumed_run_doubles_no_step_and_drops_a_torn_line(tmp_path: Path) -> None:
    state = write(tmp_path, [0, 1, 2], 1.0)
    write(tmp_path, [3], 1.0, state)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')
    write(tmp_path, [3, 4], 2.0, state)
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["train/loss"]) for line in lines] == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2)]


def test_a_fresh_start_begins_an_empty_file(tmp_path: Path) -> None:
    write(tmp_path, [0, 1], 1.0)
    write(tmp_path, [0], 2.0)
    assert [line["train/loss"] for line in read_lines(tmp_path / "metrics.jsonl")] == [2.0]


def test_an_event_is_a_line_in_words_and_counts_as_one(tmp_path: Path) -> None:
    logger = JSONLinesLogger()
    logger.start(context(tmp_path))
    logger.event(7, "skipped_step", "not finite")
    assert logger.state_dict() == {"num_lines": 1}
    logger.close()
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert (line["step"], line["event"], line["text"]) == (7, "skipped_step", "not finite")


def test_the_details_of_an_event_are_keys_of_its_line(tmp_path: Path) -> None:
    logger = JSONLinesLogger()
    logger.start(context(tmp_path))
    logger.event(7, "verdict", "no", verdict="non_finite", count=2, evidence={"train/loss": float("nan"), "a": [1.5]})
    logger.close()
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert (line["verdict"], line["count"]) == ("non_finite", 2)
    assert line["evidence"] == {"train/loss": None, "a": [1.5]}


def test_lines_for_which_there_is_no_room_are_written_later(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk; the signal that comes with it is ignored by Python."""
    logger = JSONLinesLogger()
    logger.start(context(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        for step in range(5):
            logger.log(step, {"train/loss": 1.0})
        with pytest.raises(OSError, match="File too large"):
            logger.flush()  # a checkpoint that knows more lines than there are would lose them
        assert (tmp_path / "metrics.jsonl").read_text().count("\n") == len(read_lines(tmp_path / "metrics.jsonl")) < 5
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    logger.log(5, {"train/loss": 1.0})
    logger.close()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == list(range(6))


def test_without_a_terminal_the_console_prints_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(plain_every_s=3600)
    console.start(context(tmp_path))
    for step in range(1, 11):
        console.advance(step)
        figures = {"train/loss": 2.0 / step, "train/loss_uniform": 6.931, "train/lr": 0.001, "perf/images_per_s": 100.0}
        console.log(step, figures)
    console.log(10, {"val/knn_top1": 91.25})
    console.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "10/10"]
    assert lines[1].startswith("step 10/10  loss 0.200 of ln K 6.931  lr 1.00e-03  images/s 100")
    assert "k-NN 91.2 %" in lines[1]


def test_the_time_left_does_not_take_the_first_step_for_the_pace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(plain_every_s=0)
    console.start(RunContext(run_dir=tmp_path, first_step=0, total_steps=10_000, steps_per_epoch=100))
    time.sleep(0.5)  # 10,000 steps of half a second are an hour and a half
    for step in (1, 2, 3):
        console.log(step, {"train/loss": 1.0})
    console.close()
    first, *others = (line.rpartition("left ")[2] for line in capsys.readouterr().out.splitlines())
    assert first == "-"
    assert all(left < "00:15:00" for left in others), others


def test_a_negative_period_is_refused() -> None:
    with pytest.raises(ValueError, match=r"logger.console.plain_every_s=-1"):
        Console(plain_every_s=-1)
