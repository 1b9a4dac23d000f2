"""Sends what `metrics.jsonl` of a run directory has to a tracker; a process of its own.

    python -m dino.logger.mirror RUN wandb          what was not sent yet, for example because there was no network

A run starts the same with `--parent PID`; then it follows the file until that process has ended or says so on standard
input, and takes some seconds at most after that.
"""

import argparse
import contextlib
import fcntl
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from dino import preemption
from dino.logger.sent import FOLDER, Sent, read_json

LOOK_EVERY_S = 0.5
END_OF_PNG = b"IEND\xaeB`\x82"  # of a picture that is written to its end


class Destination(Protocol):
    """A tracker, as the mirror sees it. Loading it may take seconds, each call as long as it likes."""

    def metrics(self, line: dict[str, Any]) -> None:
        """A line of metrics as in `metrics.jsonl`, with `step`, `epoch` and `time`; none is null."""

    def event(self, line: dict[str, Any]) -> None:
        """A line with `event` and `text`, and maybe further keys."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """A PNG, such as `attention` of a step."""

    def report(self, step: int, path: Path) -> None:
        """A self-contained HTML page about the whole run, whose last step is `step`."""

    def flush(self) -> None:
        """All that there is at the moment was handed over. An exception, here as elsewhere, is the mirror's end."""

    def close(self) -> None:
        """Sends what is left."""


# ---------------------------------------------------------------------- what there is to send


class Lines:
    """The whole lines of a file that grows, with their numbers from 1; one that was cut back is read anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._number = self._end = 0

    def new(self) -> Iterator[tuple[int, bytes]]:
        with self._path.open("rb") as file:
            if not self._stands(file):
                self._number = self._end = 0
            file.seek(self._end)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._number, self._end = self._number + 1, self._end + len(line)
                yield self._number, line

    def _stands(self, file: IO[bytes]) -> bool:
        """Whether a line still ends where the last one did that was read."""
        if self._end == 0:
            return True
        file.seek(self._end - 1)
        return file.read(1) == b"\n"


def unsent_pictures(run_dir: Path, sent: Sent) -> Iterator[tuple[int, str, Path]]:
    """Step, name and path of every whole picture below `pictures/`; those of `step_00000132/` are of step 132."""
    folder = run_dir / "pictures"
    for path in sorted(folder.glob("**/*.png")):
        place = path.relative_to(folder).as_posix()
        if place not in sent.pictures and path.read_bytes().endswith(END_OF_PNG):
            _, _, step = path.parent.name.rpartition("step_")
            sent.note_picture(place)
            yield int(step) if step.isdigit() else 0, path.stem, path


# ---------------------------------------------------------------------- from the file to the tracker


def mirror(run_dir: Path, name: str, ended: threading.Event) -> None:
    """Sends lines and pictures as they come, until `ended`; then the rest and the report."""
    with _alone(run_dir / FOLDER / f"{name}.lock"):  # the mirror of the attempt before may have a last line to send
        settings = read_json(run_dir / FOLDER / f"{name}.json")
        sent = Sent(run_dir, name, settings["id"])
        destination = _destination(run_dir, name, settings)
        lines = Lines(run_dir / "metrics.jsonl")
        step = 0
        while True:
            is_last_look, anything_new = ended.is_set(), False
            for number, text in lines.new():
                line, anything_new = _parsed(text), True
                step = line.get("step", step)
                if number > sent.num_lines:
                    sent.note_lines(number)
                    _send(line, destination)
            if anything_new or is_last_look:  # pictures come with an evaluation, whose line follows them
                for picture_step, title, path in unsent_pictures(run_dir, sent):
                    destination.picture(picture_step, title, path)
            destination.flush()
            if is_last_look:
                break
            ended.wait(LOOK_EVERY_S)
        if (run_dir / "report.html").exists():
            destination.report(step, run_dir / "report.html")
        destination.close()


def _send(line: dict[str, Any], destination: Destination) -> None:
    if "event" in line:
        destination.event(line)
    elif line:
        destination.metrics({name: value for name, value in line.items() if value is not None})


def _parsed(text: bytes) -> dict[str, Any]:
    """The line; empty for one that is damaged."""
    try:
        line = json.loads(text)
    except ValueError:
        return {}
    return line if isinstance(line, dict) else {}


def _destination(run_dir: Path, name: str, settings: dict[str, Any]) -> Destination:
    """Imported only now, and only here: the trackers take seconds."""
    if name == "wandb":
        from dino.logger.wandb_destination import WandbDestination

        return WandbDestination(run_dir, settings)
    from dino.logger.tensorboard_destination import TensorBoardDestination

    return TensorBoardDestination(run_dir / "tensorboard")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------- the process


def _follow(parent: int, finish_timeout_s: float, ended: threading.Event) -> None:
    """Sets `ended` with the run's end, and ends this process if it takes too long after that."""
    readable: list[Any] = []
    while not readable and os.getppid() == parent:  # a forked worker may keep the pipe open
        readable, _, _ = select.select([0], [], [], LOOK_EVERY_S)
    text = os.read(0, 100).decode() if readable else ""
    seconds = float(text) if text.strip() else finish_timeout_s
    ended.set()
    time.sleep(seconds)
    print(f"not done {seconds:g} s after the end of the run", flush=True)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dino.logger.mirror", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("tracker", choices=["wandb", "tensorboard"])
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--finish-timeout-s", type=float, default=60.0, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if not (words.run / FOLDER / f"{words.tracker}.json").exists():
        parser.error(f"{words.run}: no run with logger={words.tracker}")
    ended = threading.Event()
    if words.parent is None:
        ended.set()
    else:
        threading.Thread(target=_follow, args=(words.parent, words.finish_timeout_s, ended), daemon=True).start()
    try:
        mirror(words.run.absolute(), words.tracker, ended)
    except Exception as error:  # of whatever kind a tracker's are; training repeats the last line
        if words.parent is not None:  # into its log
            traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        sys.exit(1)


if __name__ == "__main__":
    if "--parent" in sys.argv:  # the run's end is for the run to tell
        for number in (*preemption.SIGNALS, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    main()
