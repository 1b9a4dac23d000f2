"""The run directory: what is written whatever happens (`config.yaml`, `status.json`, `train.log`)."""

import contextlib
import fcntl
import json
import logging
import logging.handlers
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from dino import preemption
from dino.exits import (
    EXIT_BAD_CONFIGURATION,
    EXIT_COLLAPSED,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NON_FINITE,
    EXIT_PREEMPTED,
)
from dino.preemption import Preempted
from dino.processes import Processes

log = logging.getLogger("dino")

LOCK = ".lock"
LOST_RANK = ("Connection reset by peer", "Connection closed by peer", "ncclRemoteError")  # as gloo and NCCL say it
LOCK_WAIT_S = 10  # for a process before this one that is on its way out


class NonFiniteError(RuntimeError):
    """More steps than allowed had a loss or a gradient that is not finite; none of them changed anything."""


class NonFiniteFeaturesError(ValueError):
    """Features that are not finite, so that nothing can be said of them."""

    def __init__(self, judge: str) -> None:
        super().__init__(f"{judge} got features that are not finite: the network that made them has diverged")


class CollapseError(RuntimeError):
    """The run will not recover, and was asked to stop then; its last state is saved."""


class Run:
    """One run's directory, as a context: status and log are kept up to date from `begin` to the way out.

    Before `begin` nothing in the directory is touched, so that a run that is refused (a `ValueError`) neither leaves a
    directory behind nor changes the record of an earlier run in it. `Preempted` ends the process with exit code 75, and
    whatever handled the signal before is called then. Any other exception is written with its traceback to `train.log`,
    becomes the reason in `status.json`, and ends the process with the exit code of its kind (1 failed, 2 bad
    configuration, 3 non-finite, 4 collapsed, 130 interrupted).

    Under several ranks only rank 0 prints and keeps the status; the others add their warnings to the log, and a failure
    of their own with its traceback.
    """

    def __init__(self, directory: Path, provenance: dict[str, str], processes: Processes | None = None) -> None:
        self.directory = directory
        self.provenance = provenance
        self.processes = processes or Processes()
        self.status: dict[str, Any] = {"state": "created", "step": 0, "reason": None, "exit_code": None, **provenance}
        # Holds what is logged before `begin`, when it is not yet known whether there will be a run.
        self._early = logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
        self._file: logging.Handler | None = None
        self._stdout = _CurrentStdout()
        self._status_written = True  # the last time
        self._locked: TextIO | None = None

    def __enter__(self) -> "Run":
        preemption.listen()
        if (self.directory / LOCK).exists():
            self._lock()
        self._stdout.setFormatter(logging.Formatter("%(message)s"))
        log.setLevel(logging.INFO if self.processes.is_main else logging.WARNING)
        log.propagate = False
        log.addHandler(self._early)
        if self.processes.is_main:
            log.addHandler(self._stdout)
        return self

    def begin(self, step: int = 0) -> None:
        """The run is on: opens `train.log` and writes `status.json`; the other ranks once rank 0 has the directory.

        Raises:
            ValueError: another process trains in the directory.
        """
        from dino.ranks import wait_for_all  # it needs torch

        if self.processes.is_main:
            self._open(step)
        wait_for_all()
        if not self.processes.is_main:
            self._open(step)

    def _open(self, step: int = 0) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock()
        earlier = read_status(self.directory)
        self._file = _LogFile(self.directory / "train.log")
        rank = f" [rank {self.processes.rank}]" if self.processes.several else ""
        self._file.setFormatter(logging.Formatter(f"%(asctime)s{rank} %(levelname)s %(message)s"))
        self._early.setTarget(self._file)
        self._early.flush()
        log.removeHandler(self._early)
        log.addHandler(self._file)
        if earlier.get("state") == "running" and self.processes.is_main:
            log.info("note        the attempt before this one ended without a word: killed, or the machine went down")
        self.update(state="running", step=step, saved_step=earlier.get("saved_step"))

    def _lock(self) -> None:
        """Holds the directory for this process, whose end, whatever it is, lets go of it.

        Raises:
            ValueError: another process trains in it.
        """
        if self._locked is not None or not self.processes.is_main:
            return
        file = (self.directory / LOCK).open("a")
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                if time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                owner = read_status(self.directory)
                raise ValueError(
                    f"run_dir={self.directory}: process {owner.get('pid')} on {owner.get('host')} trains in it; "
                    "wait for its end, or give another run_dir"
                ) from None
            except OSError as error:  # some network file systems have no locks
                log.warning("%s cannot be locked (%s): take care that only one process trains in it", file.name, error)
            self._locked = file
            return

    def update(self, **values: Any) -> None:
        """Writes `status.json` anew, never leaving half a file behind; only on rank 0."""
        self.status |= {**values, "updated": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        if self.processes.is_main:
            self._write_status()

    def _write_status(self) -> None:
        """A disk that is full for a while must not end a run that goes on without it."""
        try:
            write_json(self.directory / "status.json", self.status)
            self._status_written = True
        except OSError as error:
            if self._status_written:
                log.warning("status.json cannot be written for now: %s", error)
            self._status_written = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.update(state="finished", exit_code=0)
            elif isinstance(error, Preempted):
                self._preempted(error)
                raise SystemExit(EXIT_PREEMPTED) from None
            elif self._file is None and isinstance(error, ValueError):
                self._remove_unused_directory()
            elif isinstance(error, CollapseError) and not self.processes.is_main:
                raise SystemExit(EXIT_COLLAPSED) from None  # all ranks have found it, rank 0 says so
            else:
                self._fail(error)
                raise SystemExit(exit_code(error)) from None
        finally:
            for handler in (self._early, self._file, self._stdout):
                if handler is not None:
                    log.removeHandler(handler)
                    handler.close()
            if self._locked is not None:
                self._locked.close()

    def _preempted(self, error: Preempted) -> None:
        if self._file is None and self.processes.is_main:  # starting up: the step is that of the attempt before
            self._open(step=read_status(self.directory).get("step", 0))
        self.update(state="preempted", reason=str(error), exit_code=EXIT_PREEMPTED)
        saved = any((self.directory / "checkpoints").glob("step_*.pt"))
        next_time = "the run goes on from its newest checkpoint" if saved else "it begins anew: nothing was saved yet"
        log.info(
            "preempted   at step %d: %s; started again in %s, %s",
            self.status["step"],
            error,
            self.directory,
            next_time,
        )
        preemption.hand_on()

    def _fail(self, error: BaseException) -> None:
        if self._file is None and self.processes.is_main:
            self._open()
        # A ValueError is a sentence for the user.
        of_all = isinstance(error, CollapseError)
        named = str(error) if of_all or isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        if self.processes.several and any(words in str(error) for words in LOST_RANK):
            named = (
                "the connection to another rank is lost: it has failed, was killed (out of memory?), or its machine "
                "went down; the same command goes on from the newest checkpoint"
            )
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else named
        reason = f"rank {self.processes.rank}: {reason}" if self.processes.several and not of_all else reason
        # When one rank fails, the others lose their connection to it; what counts is the failure that came first.
        known = read_status(self.directory)
        first = not (self.processes.several and known.get("state") == "failed")
        if first and self._file is not None:
            self.status |= {"state": "failed", "reason": reason, "exit_code": exit_code(error)}
            if not self.processes.is_main:
                self.status["saved_step"] = known.get("saved_step")  # rank 0 saves
            self._write_status()
        if of_all:
            log.error("stopped     %s", reason)
            return
        if self._file is not None:
            with contextlib.suppress(OSError), (self.directory / "train.log").open("a") as file:
                file.write("".join(traceback.format_exception(error)))
        log.error("%s (full traceback in %s)", reason, self.directory / "train.log")
        if self._file is None:
            print(reason, file=sys.stderr)  # before the run has begun, rank 0 says more
        elif self.processes.several:  # rank 0 may be waiting for this one, and print nothing of it
            print(f"[rank {self.processes.rank}]", *traceback.format_exception(error), sep="\n", file=sys.stderr)

    def _remove_unused_directory(self) -> None:
        """Takes away the directory that Hydra has made for the run, if nothing else is in it."""
        if self.directory.is_dir() and {path.name for path in self.directory.iterdir()} <= {".hydra"}:
            shutil.rmtree(self.directory)


def exit_code(error: BaseException) -> int:
    """The exit code of a run that ends with `error`."""
    if isinstance(error, NonFiniteError | NonFiniteFeaturesError):
        return EXIT_NON_FINITE
    if isinstance(error, CollapseError):
        return EXIT_COLLAPSED
    if isinstance(error, ValueError):
        return EXIT_BAD_CONFIGURATION
    return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_FAILED


def read_status(directory: Path) -> dict[str, Any]:
    """The `status.json` of a run directory; empty where there is none."""
    try:
        status = json.loads((directory / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def write_json(path: Path, value: Any, *, durable: bool = False) -> None:
    """Writes to a temporary name beside `path`, then renames: a reader sees the old file or the new one.

    Args:
        durable: also after the machine has crashed, at the cost of waiting for the disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w") as file:
            file.write(json.dumps(value, indent=1) + "\n")
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


class _LogFile(logging.FileHandler):
    """Leaves out what cannot be written: the terminal has it too."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the name is logging's
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _CurrentStdout(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stdout` is now, so that lines appear above a live progress bar."""

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Ignored: the stream is looked up at every line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the name is logging's
        if isinstance(sys.exc_info()[1], OSError):
            go_on_without_stdout()
        else:
            super().handleError(record)


def go_on_without_stdout() -> None:
    """A terminal or pipe that has gone away ends no run: from now on only `train.log` has the lines."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
