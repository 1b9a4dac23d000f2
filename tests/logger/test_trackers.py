"""Trackers beside handmade runs: what they are sent, once, whatever ends their process or the run's."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image
from tracker_files import (
    mirrors_of,
    num_sent,
    scalars,
    tensorboard,
    wandb_ids,
    wandb_records,
    wandb_rows,
)

from dino.logger import JSONLinesLogger, RunContext, TensorBoardLogger, WandbLogger
from dino.logger.tracker import Tracker, finish_closed

CONFIG = {
    "fingerprint": "0123456789abcdef",
    "backbone": {"_target_": "dino.backbone.VisionTransformer"},
    "dataset": {"name": "digits"},
}


def offline(**settings: Any) -> WandbLogger:
    return WandbLogger(mode="offline", **settings)


class HandmadeRun:
    """The loggers of a run, as the trainer uses them."""

    def __init__(
        self, folder: Path, tracker: Tracker, state: dict[str, Any] | None = None, first_step: int = 0
    ) -> None:
        folder.mkdir(exist_ok=True)
        if not (folder / "config.yaml").exists():
            (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
        self.folder, self.tracker, self.first_step = folder, tracker, first_step
        self.jsonl = JSONLinesLogger()
        if state is not None:
            self.jsonl.load_state_dict(state["jsonl"])
            tracker.load_state_dict(state["tracker"])

    def __enter__(self) -> "HandmadeRun":
        for logger in (self.jsonl, self.tracker):
            logger.start(RunContext(self.folder, self.first_step, total_steps=100, steps_per_epoch=10))
        return self

    def log(self, *steps: int) -> None:
        for step in steps:
            for logger in (self.jsonl, self.tracker):
                logger.log(step, {"train/loss": 1 / (step + 1), "train/lr": float("nan")})

    def event(self, step: int, name: str, text: str, **details: Any) -> None:
        for logger in (self.jsonl, self.tracker):
            logger.event(step, name, text, **details)

    def state(self) -> dict[str, Any]:
        return {"jsonl": self.jsonl.state_dict(), "tracker": self.tracker.state_dict()}

    def mirror(self) -> psutil.Process:
        (mirror,) = mirrors_of(os.getpid())
        return mirror

    def __exit__(self, *_: object) -> None:
        self.jsonl.close()
        self.tracker.close()
        finish_closed()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def send_by_hand(folder: Path, tracker: str) -> None:
    """The command that a warning names."""
    subprocess.run([sys.executable, "-m", "dino.logger.mirror", str(folder), tracker], check=True, timeout=60)


def steps(folder: Path) -> list[int]:
    """Of all rows that wandb was sent."""
    return [row["step"] for row in wandb_rows(folder)]


def picture(path: Path, colour: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 6, 3), colour, dtype=np.uint8)).save(path)
    return path


# ---------------------------------------------------------------------- what is sent


def test_events_pictures_and_report_are_sent_and_nothing_twice(tmp_path: Path) -> None:
    for tracker in (offline(tags=["mine"], group="a sweep"), TensorBoardLogger()):
        with HandmadeRun(tmp_path, tracker) as run:
            run.log(0)
            run.event(3, "expected_move", "the peak of lr", cause="lr_peak")
            run.event(
                7, "verdict", "the loss is at ln K", verdict="uniform_collapse", severe=True, count=2, evidence={}
            )
            picture(tmp_path / "pictures" / "views.png", 10)
            picture(tmp_path / "pictures" / "step_00000012" / "attention.png", 20)
            (tmp_path / "report.html").write_text("<p>report</p>")
        send_by_hand(tmp_path, tracker.name)

    rows = wandb_rows(tmp_path)
    assert [row["step"] for row in rows if "train/loss" in row] == [0]
    (verdict,) = (row for row in rows if "health/uniform_collapse" in row)
    assert (verdict["step"], verdict["health/uniform_collapse"]) == (7, 2)
    assert verdict["events/verdict"] == "the loss is at ln K"
    assert [row["events/expected_move"] for row in rows if "events/expected_move" in row] == ["the peak of lr"]
    (alert,) = wandb_records(tmp_path, "alert")
    assert (alert.title, alert.text, alert.level) == ("uniform_collapse", "the loss is at ln K", "ERROR")
    images = {name: row["step"] for row in rows for name in row if name.startswith("pictures/") and "/_type" in name}
    images |= {name: row["step"] for row in rows for name in row if name in ("pictures/views", "pictures/attention")}
    assert sorted(images.values()) == [0, 12]
    assert sum(str(path).endswith(".png") for path in tmp_path.glob("wandb/*run*/files/media/**/*")) == 2
    assert [path.read_text() for path in tmp_path.glob("wandb/*run*/files/media/html/*.html")][:1] == ["<p>report</p>"]
    first = wandb_records(tmp_path, "run")[0]
    assert (list(first.tags), first.run_group, first.display_name) == (
        ["VisionTransformer", "digits", "mine"],
        "a sweep",
        tmp_path.name,
    )

    files = tensorboard(tmp_path)
    assert [event.step for event in files.Images("pictures/attention")] == [12]
    assert (files.Images("pictures/views")[0].width, files.Images("pictures/views")[0].height) == (6, 4)
    (text,) = files.Tensors("events/verdict")
    assert (text.step, text.tensor_proto.string_val[0]) == (7, b"**uniform_collapse**: the loss is at ln K")
    assert scalars(tmp_path)["health/uniform_collapse"] == [(7, 2.0)]
    assert scalars(tmp_path)["train/loss"] == [(0, 1.0)]


def test_a_picture_is_sent_when_it_is_whole(tmp_path: Path) -> None:
    whole = picture(tmp_path / "whole.png", 30).read_bytes()
    with HandmadeRun(tmp_path, TensorBoardLogger()) as run:
        torn = tmp_path / "pictures" / "step_00000001" / "attention.png"
        torn.parent.mkdir(parents=True)
        torn.write_bytes(whole[:-20])
        run.log(0, 1)
        wait_for(lambda: num_sent(tmp_path, "tensorboard") == 2)
        torn.write_bytes(whole)
    assert [event.encoded_image_string for event in tensorboard(tmp_path).Images("pictures/attention")] == [whole]


def test_a_tracker_that_joins_later_is_sent_what_was_before(tmp_path: Path) -> None:
    with HandmadeRun(tmp_path, offline()) as run:
        run.log(0, 1)
        state = {"jsonl": run.jsonl.state_dict(), "tracker": {"id": None}}
    with HandmadeRun(tmp_path, TensorBoardLogger(), state, first_step=1) as run:
        run.log(2)
    assert scalars(tmp_path)["train/loss"] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    assert "train/lr" not in scalars(tmp_path)


def test_disabled_starts_nothing(tmp_path: Path) -> None:
    with HandmadeRun(tmp_path, WandbLogger(mode="disabled")) as run:
        run.log(0)
        assert mirrors_of(os.getpid()) == []
    assert not (tmp_path / "trackers").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mode": "dryrun"}, r"logger\.wandb\.mode=dryrun: use online, offline or disabled"),
        ({"finish_timeout_s": -1}, r"logger\.wandb\.finish_timeout_s=-1: use 0 or more seconds"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        WandbLogger(**settings)


# ---------------------------------------------------------------------- resumed


def test_a_resumed_run_is_the_same_run_and_sends_no_line_twice(tmp_path: Path) -> None:
    with HandmadeRun(tmp_path, offline()) as run:
        run.log(0, 1, 2)
        state = run.state()
        run.log(3, 4)
    with HandmadeRun(tmp_path, offline(), state, first_step=2) as run:
        run.log(3, 4, 5, 6)
    assert steps(tmp_path) == list(range(7))
    assert len(wandb_ids(tmp_path)) == 2
    assert set(wandb_ids(tmp_path)) == {state["tracker"]["id"]}


def test_the_checkpoint_knows_the_run_when_the_folder_of_the_trackers_is_gone(tmp_path: Path) -> None:
    with HandmadeRun(tmp_path, offline()) as run:
        run.log(0, 1)
        state = run.state()
    for path in (tmp_path / "trackers").iterdir():
        path.unlink()
    with HandmadeRun(tmp_path, offline(), state, first_step=1) as run:
        run.log(2)
    assert steps(tmp_path) == [0, 1, 2]
    assert len(set(wandb_ids(tmp_path))) == 1


def test_another_run_has_another_id(tmp_path: Path) -> None:
    """One that begins with this run's checkpoint elsewhere, and one with other settings in the same directory."""
    with HandmadeRun(tmp_path / "run", offline()) as run:
        run.log(0, 1)
        state = run.state()
    with HandmadeRun(tmp_path / "other", offline(), state, first_step=1) as run:
        run.log(2)
    assert steps(tmp_path / "other") == [2]
    assert set(wandb_ids(tmp_path / "other")).isdisjoint(wandb_ids(tmp_path / "run"))
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "fingerprint": "f"}, sort_keys=False))
    with HandmadeRun(tmp_path / "run", offline()) as run:
        run.log(0)
    assert steps(tmp_path / "run") == [0, 1, 0]
    assert len(set(wandb_ids(tmp_path / "run"))) == 2


# ---------------------------------------------------------------------- ended by force


def test_a_mirror_that_is_killed_is_named_once_and_its_rest_sent_by_the_command(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="dino")
    with HandmadeRun(tmp_path, offline()) as run:
        run.log(0, 1)
        wait_for(lambda: num_sent(tmp_path, "wandb") == 2)
        mirror = run.mirror()
        mirror.kill()
        wait_for(lambda: not mirrors_of(os.getpid()))
        run.log(2, 3, 4)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert re.match(r"wandb: its process ended with signal SIGKILL; metrics.jsonl has everything, [123] lines", warning)
    assert warning.endswith(f"-m dino.logger.mirror {tmp_path} wandb")
    send_by_hand(tmp_path, "wandb")
    # What the killed process had been given last may be lost, and is not sent again.
    assert sorted({*steps(tmp_path), 0, 1}) == [0, 1, 2, 3, 4]
    assert len(steps(tmp_path)) == len(set(steps(tmp_path)))


def test_wandb_s_own_process_is_killed(tmp_path: Path) -> None:
    with HandmadeRun(tmp_path, offline(finish_timeout_s=5)) as run:
        run.log(0, 1)
        wait_for(lambda: num_sent(tmp_path, "wandb") == 2)
        (service,) = run.mirror().children()
        service.kill()
        run.log(2, 3)
    assert mirrors_of(os.getpid()) == []
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 4


def test_signals_that_end_a_run_leave_the_mirror_its_last_lines(tmp_path: Path) -> None:
    with HandmadeRun(tmp_path, offline()) as run:
        run.log(0)
        wait_for(lambda: num_sent(tmp_path, "wandb") == 1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            run.mirror().send_signal(number)
        run.log(1, 2)
    assert steps(tmp_path) == [0, 1, 2]


def test_a_run_that_is_killed_leaves_a_mirror_that_finishes(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from dino.logger import JSONLinesLogger, RunContext, WandbLogger
loggers = [JSONLinesLogger(), WandbLogger(mode="offline")]
for logger in loggers:
    logger.start(RunContext(Path({str(tmp_path)!r}), 0, 10, 10))
for step in range(5):
    for logger in loggers:
        logger.log(step, {{"train/loss": 1.0}})
if os.fork() == 0:  # as a worker that still holds the pipe
    signal.pause()
os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    assert process.wait(timeout=60) == -signal.SIGKILL
    try:
        send_by_hand(tmp_path, "wandb")  # has nothing to do, and waits until the other has ended
        assert steps(tmp_path) == list(range(5))
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_server_that_never_answers_costs_the_end_of_a_run_its_time_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="dino")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        with HandmadeRun(tmp_path, WandbLogger(mode="online", finish_timeout_s=3)) as run:
            run.log(0, 1)
    assert mirrors_of(os.getpid()) == []
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "(not done 3 s after the end of the run); metrics.jsonl has everything, 2 lines of it" in warning


def test_a_login_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="dino")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with HandmadeRun(tmp_path, WandbLogger(mode="online")) as run:
        run.log(0)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "exit code 1 (UsageError: No API key configured." in warning


def test_a_directory_that_cannot_be_written_costs_the_tracker_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "trackers").write_text("a file is in its way")
    with HandmadeRun(tmp_path, TensorBoardLogger()) as run:
        run.log(0, 1)
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "dino"]
    assert warning.startswith("tensorboard: cannot be started")
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def test_a_mirror_that_hangs_as_a_whole_is_killed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="dino")
    with HandmadeRun(tmp_path, TensorBoardLogger(finish_timeout_s=1)) as run:
        run.log(0)
        wait_for(lambda: num_sent(tmp_path, "tensorboard") == 1)
        run.mirror().send_signal(signal.SIGSTOP)
        run.log(1)
    assert mirrors_of(os.getpid()) == []
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("tensorboard: its process ended with signal SIGKILL")
