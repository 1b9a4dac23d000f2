"""Trackers of whole runs at the command line: complete beside `metrics.jsonl`, and never in the way of the run."""

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from command_line import REPOSITORY, TINY, finish, metrics, run, start, status, train, wait_until
from tracker_files import (
    mirrors_of,
    num_sent,
    scalars,
    wandb_ids,
    wandb_records,
    wandb_rows,
    without_times,
)

from dino import validation
from dino.messages import ConfigError

BOTH = ("logger=[wandb,tensorboard]", "logger.wandb.mode=offline", "run_dir=run")
LONG = ("trainer.epochs=100", "evaluation=[]", "trainer.save_every_steps=10", "monitor.report=false")  # 600 steps
OTHER_ROWS = ("events/", "pictures/", "report")  # of wandb, that are no lines of metrics


def assert_complete(run_dir: Path) -> None:
    """Both trackers have every line of `metrics.jsonl`, once."""
    lines = [line for line in metrics(run_dir) if "event" not in line]
    rows = [row for row in wandb_rows(run_dir) if not any(name.startswith(OTHER_ROWS) for name in row)]
    assert sorted(_where(row) for row in rows) == sorted(_where(line) for line in lines)
    ours = {_where(line): without_times(line) for line in lines}
    for row in rows:
        _assert_same_but_times(without_times(row), ours[_where(row)])
    outside = ("health/", "perf/first_step_s")  # the second is of every start
    figures = {name: points for name, points in scalars(run_dir).items() if not name.startswith(outside)}
    for name, points in figures.items():
        expected = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        assert [step for step, _ in points] == [step for step, _ in expected], name
        if not name.startswith("perf/"):
            assert [value for _, value in points] == pytest.approx([value for _, value in expected], rel=1e-6), name
    assert set(figures) == {name for line in ours.values() for name in line} - {"step", "epoch", "perf/first_step_s"}


def wait_for_end_of_mirrors(run_dir: Path) -> None:
    for path in (run_dir / "trackers").glob("*.lock"):
        with path.open("a") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)


def _where(line: dict[str, object]) -> tuple[object, bool]:
    """A line of a step, or of the evaluation at it."""
    return line["step"], "train/loss" in line


def _assert_same_but_times(row: dict[str, float], line: dict[str, float]) -> None:
    """Lines that a resumed run wrote again have other times than those that were sent, and say when it started."""
    assert row.keys() ^ line.keys() <= {"perf/first_step_s"}
    names = [name for name in line if not name.startswith("perf/")]
    assert [row[name] for name in names] == pytest.approx([line[name] for name in names], rel=1e-12)


def test_both_trackers_have_config_tags_and_every_line(tmp_path: Path) -> None:
    result = train(*BOTH, "logger.wandb.tags=[mine]", "monitor.report=true", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "its process ended" not in result.stderr
    run_dir = tmp_path / "run"
    assert_complete(run_dir)
    pages = [path.read_text() for path in run_dir.glob("wandb/*run*/files/media/html/*.html")]
    assert set(pages) == {(run_dir / "report.html").read_text()}  # wandb keeps a file of it more than once
    (record,) = wandb_records(run_dir, "run")
    assert list(record.tags) == ["vit_micro4", "digits", "mine"]
    assert (record.project, record.display_name) == ("dino", "run")
    config = {item.key: json.loads(item.value_json) for item in record.config.update}
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert {name: config[name] for name in saved} == saved
    assert {path.name for path in tmp_path.iterdir()} == {"run"}  # no wandb/ in the working directory


@pytest.mark.parametrize(
    ("words", "loggers"),
    [
        ([], ["jsonl", "console"]),
        (["logger=wandb"], ["jsonl", "console", "wandb"]),
        (
            ["logger=[tensorboard,wandb]", "logger.console.plain_every_s=0"],
            ["jsonl", "console", "tensorboard", "wandb"],
        ),
        (["logger=tensorboard", "~logger.console"], ["jsonl", "tensorboard"]),
        (["~logger"], ["jsonl", "console"]),
    ],
)
def test_trackers_are_added_behind_what_is_always_there(words: list[str], loggers: list[str]) -> None:
    """The first one to start is that of `metrics.jsonl`, which a resumed run cuts back."""
    assert list(validation.checked(words)[0].logger) == loggers


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("logger.wandb.mode=dryrun", "logger.wandb.mode=dryrun: use online or offline or disabled"),
        ("logger.wandb.finish_timeout_s=-1", "logger.wandb.finish_timeout_s=-1: use a number of at least 0"),
        ("logger.wandb.tags=mine", "logger.wandb.tags=mine: use a list of texts"),
        ("logger.wandb.projct=mine", "did you mean logger.wandb.project?"),
    ],
)
def test_bad_settings_are_refused(word: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        validation.checked(["logger=wandb", word])


def test_the_environment_of_wandb_is_respected(tmp_path: Path) -> None:
    process = start(
        *("logger=wandb", "run_dir=run", "trainer.max_steps=1", "evaluation=[]", "monitor.report=false"),
        cwd=tmp_path,
        environment={"WANDB_MODE": "offline", "WANDB_PROJECT": "mine"},
    )
    assert finish(process).returncode == 0
    (record,) = wandb_records(tmp_path / "run", "run")
    assert record.project == "mine"


@pytest.mark.slow
def test_killed_and_resumed_it_is_one_run_with_every_line_once(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for _ in range(2):
        already = num_sent(run_dir, "wandb")
        process = start(*BOTH, *LONG, cwd=tmp_path)
        wait_until(lambda sent=already: num_sent(run_dir, "wandb") >= sent + 20, process)
        process.send_signal(signal.SIGKILL)
        finish(process)
        wait_for_end_of_mirrors(run_dir)
    result = train(*BOTH, *LONG, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_complete(run_dir)
    assert len(wandb_ids(run_dir)) == 3, "each attempt had something to send"
    assert len(set(wandb_ids(run_dir))) == 1


@pytest.mark.slow
def test_preempted_with_its_group_and_resumed_every_line_is_there_once(tmp_path: Path) -> None:
    """Also a scheduler's way: the signal goes to every process of the job."""
    run_dir = tmp_path / "run"
    process = start(*BOTH, *LONG, cwd=tmp_path)
    wait_until(lambda: min(num_sent(run_dir, t) for t in ("wandb", "tensorboard")) >= 10, process)
    for member in psutil.Process(process.pid).children():
        member.send_signal(signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    assert finish(process).returncode == 75
    assert num_sent(run_dir, "wandb") == len(metrics(run_dir))
    result = train(*BOTH, *LONG, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_complete(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["mirror", "service"])
def test_a_tracker_that_is_killed_does_not_touch_the_run(tmp_path: Path, victim: str) -> None:
    run_dir = tmp_path / "run"
    process = start("logger=wandb", "logger.wandb.mode=offline", "run_dir=run", *LONG, cwd=tmp_path)
    wait_until(lambda: num_sent(run_dir, "wandb") >= 10, process)
    (mirror,) = mirrors_of(process.pid)
    (mirror if victim == "mirror" else mirror.children()[0]).kill()
    result = finish(process)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line["step"] for line in metrics(run_dir) if "train/loss" in line] == list(range(1, 601))
    said = [line for line in (run_dir / "train.log").read_text().splitlines() if "wandb: its process ended" in line]
    assert len(said) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB where wandb is to write."""
    disk = tmp_path / "run" / "wandb"
    disk.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small tmpfs is for root: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_full_disk_of_the_tracker_does_not_touch_the_run(tmp_path: Path, small_disk: Path, when: str) -> None:
    run_dir = tmp_path / "run"
    if when == "before":
        _fill(small_disk)
    process = start(
        *("logger=wandb", "logger.wandb.mode=offline", "logger.wandb.finish_timeout_s=5", "run_dir=run", *LONG),
        cwd=tmp_path,
    )
    if when == "meanwhile":
        wait_until(lambda: num_sent(run_dir, "wandb") >= 10, process)
        _fill(small_disk)
    result = finish(process)
    assert result.returncode == 0, result.stdout + result.stderr
    assert status(run_dir)["state"] == "finished"
    assert [line["step"] for line in metrics(run_dir) if "train/loss" in line] == list(range(1, 601))
    said = [line for line in (run_dir / "train.log").read_text().splitlines() if "wandb: its process ended" in line]
    assert len(said) == 1


def _fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.slow
def test_a_server_that_never_answers_does_not_touch_the_run(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = start(
            *("logger=[wandb,tensorboard]", "logger.wandb.finish_timeout_s=4", "run_dir=run", "monitor.report=false"),
            cwd=tmp_path,
            environment={
                "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}",
                "WANDB_API_KEY": "0" * 40,
                "WANDB_MODE": "online",
            },
        )
        result = finish(process)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "wandb: waiting up to 4 s" in result.stderr
    assert "(not done 4 s after the end of the run); metrics.jsonl has everything" in result.stderr
    assert num_sent(tmp_path / "run", "tensorboard") == len(metrics(tmp_path / "run"))


@pytest.mark.slow
def test_points_of_a_multirun_are_runs_of_their_own(tmp_path: Path) -> None:
    words = [*TINY, *BOTH[:2], "seed=0,1", "monitor.report=false", "hydra.sweep.dir=sweep"]
    result = run([sys.executable, str(REPOSITORY / "train.py"), "-m", *words], cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    points = [path.parent for path in sorted(tmp_path.glob("sweep/*/metrics.jsonl"))]
    assert len(points) == 2
    for point in points:
        assert_complete(point)
    assert len({identity for point in points for identity in wandb_ids(point)}) == 2
