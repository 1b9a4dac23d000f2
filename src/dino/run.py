"""The run directory: what is written whatever happens (`config.yaml`, `status.json`, `train.log`)."""

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

log = logging.getLogger("dino")

EXIT_FAILED, EXIT_BAD_CONFIGURATION, EXIT_NON_FINITE = 1, 2, 3


class NonFiniteError(RuntimeError):
    """The loss is NaN or infinite; raised before anything was changed."""


class Run:
    """One run's directory, as a context: status and log are kept up to date from `begin` to the way out.

    Before `begin` nothing in the directory is touched, so that a run that is refused (a `ValueError`) neither leaves a
    directory behind nor changes the record of an earlier run in it. Any other exception is written with its traceback
    to `train.log`, becomes the reason in `status.json`, and ends the process with the exit code of its kind (1 failed,
    2 bad configuration, 3 non-finite, 130 interrupted).
    """

    def __init__(self, directory: Path, provenance: dict[str, str]) -> None:
        self.directory = directory
        self.provenance = provenance
        self.status: dict[str, Any] = {"state": "created", "step": 0, "reason": None, "exit_code": None, **provenance}
        # Holds what is logged before `begin`, when it is not yet known whether there will be a run.
        self._early = logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
        self._file: logging.Handler | None = None
        self._stdout = _CurrentStdout()

    def __enter__(self) -> "Run":
        self._stdout.setFormatter(logging.Formatter("%(message)s"))
        log.setLevel(logging.INFO)
        log.propagate = False
        log.addHandler(self._early)
        log.addHandler(self._stdout)
        return self

    def begin(self, step: int = 0) -> None:
        """The run is on: opens `train.log` and writes `status.json`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._file = logging.FileHandler(self.directory / "train.log")
        self._file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._early.setTarget(self._file)
        self._early.flush()
        log.removeHandler(self._early)
        log.addHandler(self._file)
        self.update(state="running", step=step)

    def update(self, **values: Any) -> None:
        """Writes `status.json` anew, never leaving half a file behind."""
        self.status |= {**values, "updated": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_json(self.directory / "status.json", self.status)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.update(state="finished", exit_code=0)
            elif self._file is None and isinstance(error, ValueError):
                self._remove_unused_directory()
            else:
                self._fail(error)
                raise SystemExit(self.status["exit_code"]) from None
        finally:
            for handler in (self._early, self._file, self._stdout):
                if handler is not None:
                    log.removeHandler(handler)
                    handler.close()

    def _fail(self, error: BaseException) -> None:
        if self._file is None:
            self.begin()
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
        self.update(state="failed", reason=reason, exit_code=_exit_code(error))
        with (self.directory / "train.log").open("a") as file:
            file.write("".join(traceback.format_exception(error)))
        log.error("%s (full traceback in %s)", reason, self.directory / "train.log")

    def _remove_unused_directory(self) -> None:
        """Takes away the directory that Hydra has made for the run, if nothing else is in it."""
        if self.directory.is_dir() and {path.name for path in self.directory.iterdir()} <= {".hydra"}:
            shutil.rmtree(self.directory)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, NonFiniteError):
        return EXIT_NON_FINITE
    if isinstance(error, ValueError):
        return EXIT_BAD_CONFIGURATION
    return 130 if isinstance(error, KeyboardInterrupt) else EXIT_FAILED


def write_json(path: Path, value: Any) -> None:
    """Writes to a temporary name beside `path`, then renames: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


class _CurrentStdout(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stdout` is now, so that lines appear above a live progress bar."""

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Ignored: the stream is looked up at every line."""
