"""Trackers: `metrics.jsonl` mirrored to Weights & Biases or TensorBoard by a process of its own (`dino.logger.mirror`).

Training neither imports a tracker nor waits for one while it trains; whatever becomes of the mirror, the run goes on.
"""

import atexit
import contextlib
import importlib.util
import logging
import os
import secrets
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dino import preemption
from dino.logger.base import Logger, RunContext
from dino.logger.sent import FOLDER, Sent, num_lines_of, read_json
from dino.run import write_json

log = logging.getLogger("dino")

SILENT_WAIT_S = 2.0  # what the end of a run may take without a word
PREEMPTED_WAIT_S = 5.0  # the most after a preemption, whose end is near
KILL_AFTER_S = 3.0  # a mirror keeps its time by itself, unless it hangs as a whole

_closed: list["Tracker"] = []  # of runs that are over, with a mirror that may still be sending


class Tracker(Logger):
    """Starts a mirror of `metrics.jsonl` with the run, and gives it some time at the end of the process.

    The mirror learns of the run's end by a pipe, also of one by SIGKILL. What it has sent stands in
    `trackers/<name>.sent`, by number of line: a resumed run, which writes the lines since its checkpoint again, sends
    none of them twice. (With `resume_changes`, lines that were sent stay as they were.)

    Args:
        name: of the tracker, as in the config.
        package: that it needs.
        settings: of the mirror, plain values; written to `trackers/<name>.json`.
        finish_timeout_s: how long the last lines may take after the run [s].

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self, name: str, package: str, settings: dict[str, Any], finish_timeout_s: float) -> None:
        if finish_timeout_s < 0:
            raise ValueError(f"logger.{name}.finish_timeout_s={finish_timeout_s}: use 0 or more seconds")
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"logger={name}: the package {package} is not installed; run pip install {package}")
        self.name = name
        self.settings = settings
        self.finish_timeout_s = finish_timeout_s
        self._id: str | None = None  # of the run in the tracker, the same after every resume
        self._mirror: subprocess.Popen[bytes] | None = None

    def start(self, context: RunContext) -> None:
        finish_closed()  # of a multirun's point before this one
        self._run_dir = context.run_dir
        try:
            self._start(context)
        except OSError as error:
            self._warn(f"cannot be started: {error}")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._look_after()

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._id = state["id"]

    def close(self) -> None:
        self._look_after()
        if self._mirror is not None:
            _closed.append(self)

    def say_that_it_is_over(self) -> None:
        """Tells the mirror that the run has ended, and how long it may go on sending."""
        assert self._mirror is not None
        assert self._mirror.stdin is not None
        with contextlib.suppress(OSError):  # it has ended
            self._mirror.stdin.write(f"{self._seconds_to_finish}\n".encode())
            self._mirror.stdin.close()

    def wait(self) -> None:
        """Gives the mirror its time to send the rest."""
        assert self._mirror is not None
        mirror, seconds = self._mirror, self._seconds_to_finish
        try:
            mirror.wait(SILENT_WAIT_S)
        except subprocess.TimeoutExpired:
            print(f"{self.name}: waiting up to {seconds:g} s for the last lines to be sent", file=sys.stderr)
            try:
                mirror.wait(max(0.0, seconds - SILENT_WAIT_S) + KILL_AFTER_S)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                os.killpg(mirror.pid, signal.SIGKILL)
                mirror.wait()
        self._look_after()

    @property
    def _seconds_to_finish(self) -> float:
        return min(self.finish_timeout_s, PREEMPTED_WAIT_S) if preemption.requested() else self.finish_timeout_s

    # ------------------------------------------------------------------ the mirror

    def _start(self, context: RunContext) -> None:
        folder = self._run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        fingerprint = _first_line(self._run_dir / "config.yaml")
        self._choose_id(read_json(folder / f"{self.name}.json"), fingerprint, resumed=context.first_step > 0)
        write_json(folder / f"{self.name}.json", {"id": self._id, "config": fingerprint, **self.settings})
        with (folder / f"{self.name}.log").open("ab") as output:
            self._log_begins_at = output.tell()
            self._mirror = subprocess.Popen(
                [*self._command(), "--parent", str(os.getpid()), "--finish-timeout-s", str(self.finish_timeout_s)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # what a terminal or scheduler sends to the run's group is not for it
            )

    def _choose_id(self, before: dict[str, Any], fingerprint: str, *, resumed: bool) -> None:
        """The id of the attempt before in this directory, unless this is another run from its first step on; without
        one that of the checkpoint, unless it is another run's: then there are no lines of the steps before it."""
        num_lines = num_lines_of(self._run_dir / "metrics.jsonl")
        if "id" in before and (resumed or before.get("config") == fingerprint):
            self._id = before["id"]
        elif self._id is not None and num_lines > 0:
            Sent(self._run_dir, self.name, self._id).note_lines(num_lines)
        else:
            self._id = secrets.token_hex(4)

    def _look_after(self) -> None:
        """Says so, once, if the mirror has ended before its time or without having sent everything."""
        if self._mirror is None or self._mirror.poll() in (None, 0):
            return
        code, self._mirror = self._mirror.returncode, None
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        words = _last_line(self._run_dir / FOLDER / f"{self.name}.log", self._log_begins_at)
        self._warn(f"its process ended with {how}{f' ({words})' if words else ''}")

    def _warn(self, what: str) -> None:
        """Training goes on; this is all that is said."""
        num_lines = num_lines_of(self._run_dir / "metrics.jsonl")
        missing = num_lines - Sent(self._run_dir, self.name, self._id).num_lines
        rest = f"{missing} lines of it were not sent so far; this sends them: {shlex.join(self._command())}"
        rest = rest if missing > 0 else self._rest_of_handed_over()
        text = f"{self.name}: {what}; metrics.jsonl has everything, {rest}"
        log.warning(text)
        if not log.handlers:  # the run is over
            with contextlib.suppress(OSError), (self._run_dir / "train.log").open("a") as file:
                file.write(f"{text}\n")

    def _rest_of_handed_over(self) -> str:
        return "and all of it was handed over"

    def _command(self) -> list[str]:
        return [sys.executable, "-P", "-m", "dino.logger.mirror", str(self._run_dir), self.name]


class WandbLogger(Tracker):
    """Weights & Biases: every line a row over `step`, verdicts as alerts, pictures and report as media.

    Args:
        mode: `online`, `offline` (`wandb sync RUN/wandb/offline-run-*` uploads it later) or `disabled`.
        project: that the run belongs to.
        entity: user or team; null: wandb's default.
        name: of the run; null: that of its directory.
        group: that the run belongs to, such as a sweep.
        tags: beside those of backbone and dataset.
        finish_timeout_s: how long the last lines may take after the run [s].
    """

    def __init__(
        self,
        mode: str = "online",
        project: str = "dino",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        finish_timeout_s: float = 60.0,
    ) -> None:
        if mode not in ("online", "offline", "disabled"):
            raise ValueError(f"logger.wandb.mode={mode}: use online, offline or disabled")
        settings = {"mode": mode, "project": project, "entity": entity, "name": name, "group": group}
        super().__init__("wandb", "wandb", {**settings, "tags": list(tags)}, finish_timeout_s)

    def start(self, context: RunContext) -> None:
        if self.settings["mode"] != "disabled":
            super().start(context)

    def _rest_of_handed_over(self) -> str:
        folder = shlex.quote(str(self._run_dir / "wandb"))
        return f"and what wandb had not uploaded of it, this does: wandb sync {folder}/*run-*-{self._id}"


class TensorBoardLogger(Tracker):
    """TensorBoard's event files in `tensorboard/`: metrics as scalars, events as text, pictures as images.

    Args:
        finish_timeout_s: how long the last lines may take after the run [s].
    """

    def __init__(self, finish_timeout_s: float = 60.0) -> None:
        super().__init__("tensorboard", "tensorboard", {}, finish_timeout_s)


def finish_closed() -> None:
    """Finishes the mirrors of all runs that are over, at the end of the process or before its next run."""
    for tracker in _closed:
        tracker.say_that_it_is_over()
    while _closed:
        _closed.pop().wait()


atexit.register(finish_closed)


def _first_line(path: Path) -> str:
    """Of `config.yaml` it is the fingerprint."""
    if not path.exists():
        return ""
    with path.open() as file:
        return file.readline().strip()


def _last_line(path: Path, begin: int) -> str:
    """The last words behind the first `begin` bytes."""
    try:
        lines = path.read_bytes()[begin:].decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
