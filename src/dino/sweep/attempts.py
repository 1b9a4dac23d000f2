"""`attempts.jsonl` of a trial: one line when a job begins to work on it, one when that ends. Never rewritten."""

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ATTEMPTS = "attempts.jsonl"


@dataclass(frozen=True, kw_only=True)
class Start:
    """A job has begun.

    Attributes:
        job: as squeue shows it (`1234_0`); None without a scheduler.
        restart: how often the scheduler has started this job before (SLURM_RESTART_COUNT).
        pid: of the process that watches over the training process.
        step: the step at which the attempt before ended.
    """

    time: float
    submission: str
    job: str | None
    restart: int
    host: str
    pid: int
    step: int


@dataclass(frozen=True, kw_only=True)
class End:
    """The training process has ended; without this line, whatever ended it ended the job as a whole.

    Attributes:
        rank: whose process ended.
        exit_code: None if a signal killed it.
        signal: such as `SIGKILL`; None if it ended by itself.
        out_of_memory: whether the system's accounts of memory say so.
        cause: what stopped it from outside: `time limit`, `preempted`, `cancelled`, `scheduler`; None: nothing did.
        requeued: whether the job will be started again.
        reason: one sentence where the above needs one, such as why it was not requeued.
    """

    time: float
    submission: str
    rank: int
    exit_code: int | None
    signal: str | None
    out_of_memory: bool
    cause: str | None
    requeued: bool
    reason: str | None
    step: int


Attempt = Start | End


def record(directory: Path, attempt: Attempt) -> None:
    """Adds a line, in one write, so that lines of several processes do not mix."""
    kind = "start" if isinstance(attempt, Start) else "end"
    line = json.dumps({"event": kind, **asdict(attempt)}) + "\n"
    file = os.open(directory / ATTEMPTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
        os.fsync(file)
    finally:
        os.close(file)


def read_attempts(directory: Path) -> Sequence[Attempt]:
    """All lines in order; one that was cut off or damaged is left out."""
    attempts: list[Attempt] = []
    try:
        lines = (directory / ATTEMPTS).read_text(errors="replace").splitlines()
    except OSError:
        return attempts
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            content = json.loads(line)
            attempts.append(Start(**content) if content.pop("event") == "start" else End(**content))
    return attempts


def now() -> float:
    return time.time()
