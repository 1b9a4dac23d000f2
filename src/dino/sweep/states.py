"""What has become of each trial, from its files and from what the cluster holds now."""

import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from dino.exits import EXIT_COLLAPSED, EXIT_NON_FINITE, EXIT_PREEMPTED
from dino.run import read_status
from dino.sweep.attempts import End, Start, read_attempts
from dino.sweep.cluster import Cluster, Live
from dino.sweep.manifest import Manifest, Trial

PENDING, RUNNING, PREEMPTED, FINISHED = "pending", "running", "preempted", "finished"
FAILED, KILLED, OUT_OF_MEMORY, TIMED_OUT = "failed", "killed", "out of memory", "timed out"
NOT_A_NUMBER, COLLAPSED, CANCELLED, PRUNED = "NaN", "collapsed", "cancelled", "pruned"

UNDER_WAY = (PENDING, RUNNING, PREEMPTED)  # as long as the cluster holds it
BROKEN = (FAILED, KILLED, OUT_OF_MEMORY, TIMED_OUT, NOT_A_NUMBER, COLLAPSED)
OF_EXIT_CODE = {EXIT_NON_FINITE: NOT_A_NUMBER, EXIT_COLLAPSED: COLLAPSED}

TAIL_BYTES = 32 * 1024  # of metrics.jsonl, for the last logged step; the last evaluation is looked for further back

LastWords = Callable[[], Mapping[str, str]]  # trial id -> state

# Slurm's last word on a job that left none of its own.
OF_SLURM = {"OUT_OF_MEMORY": OUT_OF_MEMORY, "TIMEOUT": TIMED_OUT, "DEADLINE": TIMED_OUT, "CANCELLED": CANCELLED}


@dataclass(frozen=True, kw_only=True)
class TrialState:
    """A trial as `status` and `collect` show it.

    Attributes:
        state: one of the names above.
        held: whether the cluster holds or runs it now, so that it must not be submitted again; None if unknown.
        step, total_steps: finished optimizer steps, and how many it takes.
        metrics: the last value of each metric.
        restarts: how often a job has begun to work on it, but for the first time.
        reason: why it is in this state, in a sentence.
        traceback: `file:line: message`, the innermost frame outside of installed packages.
    """

    trial: Trial
    directory: Path
    state: str
    held: bool | None = False
    step: int | None = None
    total_steps: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    restarts: int = 0
    host: str | None = None
    job: str | None = None
    reason: str | None = None
    exit_code: int | None = None
    traceback: str | None = None

    @property
    def images_per_s(self) -> float | None:
        return self.metrics.get("perf/images_per_s")


def trial_states(manifest: Manifest, cluster: Cluster) -> dict[str, TrialState]:
    """Trial id -> state, in the order of the manifest."""
    live = cluster.live(manifest)
    last_words = cache(lambda: cluster.ended(manifest))  # asked for only if a job has left no word of its own
    return {trial.id: _state_of(manifest, trial, live, last_words) for trial in manifest.trials}


def _state_of(manifest: Manifest, trial: Trial, live: Mapping[str, Live] | None, last_words: LastWords) -> TrialState:
    directory = manifest.directory(trial)
    attempts, status = read_attempts(directory), read_status(directory)
    starts = [attempt for attempt in attempts if isinstance(attempt, Start)]
    held = None if live is None else live.get(trial.id)
    submission = manifest.last_submission(trial)
    if starts and status.get("state") != FINISHED and _written(status) < starts[-1].time:
        status = {**status, "state": None, "reason": None, "exit_code": None}  # these are of an attempt before
    state, reason = _classify(manifest, trial, attempts, status, live, last_words)
    job = starts[-1].job if starts else submission.jobs.get(trial.id) if submission else None
    host = starts[-1].host if starts else None
    return TrialState(
        trial=trial,
        directory=directory,
        state=state,
        held=None if live is None and state in UNDER_WAY else held is not None and state in UNDER_WAY,
        step=status.get("step"),
        total_steps=status.get("total_steps"),
        metrics=last_metrics(directory / "metrics.jsonl"),
        restarts=max(0, len(starts) - 1),
        host=held.host if held and held.host else host,
        job=held.job if held and held.job else job,
        reason=reason,
        exit_code=status.get("exit_code"),
        traceback=innermost_frame(directory / "train.log", manifest) if status.get("state") == "failed" else None,
    )


def _classify(
    manifest: Manifest,
    trial: Trial,
    attempts: Sequence[Start | End],
    status: Mapping[str, Any],
    live: Mapping[str, Live] | None,
    last_words: LastWords,
) -> tuple[str, str | None]:
    """State and reason."""
    if status.get("state") == "finished":
        return FINISHED, status.get("reason")
    submission = manifest.last_submission(trial)
    current = [item for item in attempts if submission is not None and item.submission == submission.id]
    ends = _ends_of_last_attempt(current)
    cancelled = manifest.cancelled(trial)
    held = live.get(trial.id) if live is not None else None
    if ends and not any(end.requeued for end in ends):
        state, reason = _of_end(ends, status)
        return (state, reason) if cancelled is None or state in BROKEN else _of_cancelled(cancelled)
    if held is not None:
        if held.state == "running":
            return RUNNING, None
        why = ends[-1].reason or ends[-1].cause if ends else None
        return (PREEMPTED if attempts else PENDING), why or held.reason
    if cancelled is not None:
        return _of_cancelled(cancelled)
    if submission is None:
        return PENDING, "not submitted; resume submits it"
    if live is None:  # the cluster cannot be asked from here: what the files say
        return (PREEMPTED if ends else RUNNING if current else PENDING), None
    return _of_silence(current, status, last_words().get(trial.id), submission.jobs.get(trial.id))


def _ends_of_last_attempt(attempts: Sequence[Start | End]) -> list[End]:
    ends: list[End] = []
    for attempt in attempts:
        if isinstance(attempt, Start):
            ends = []
        else:
            ends.append(attempt)
    return ends


def _of_cancelled(reason: str) -> tuple[str, str]:
    return (PRUNED if reason.startswith(PRUNED) else CANCELLED), reason


def _of_end(ends: Sequence[End], status: Mapping[str, Any]) -> tuple[str, str | None]:
    """What the supervisor saw. When one rank fails, it ends the others: the first line counts."""
    end = ends[0]
    said = status.get("reason") if status.get("state") == "failed" else None
    reason = end.reason or said
    if end.cause == "cancelled":
        return CANCELLED, reason
    if end.exit_code == EXIT_PREEMPTED:
        return (TIMED_OUT if end.cause == "time limit" else PREEMPTED), reason or end.cause
    if end.exit_code in OF_EXIT_CODE:
        return OF_EXIT_CODE[end.exit_code], reason
    if end.out_of_memory or "out of memory" in (said or ""):
        return OUT_OF_MEMORY, reason or "the system ended it for want of memory"
    if end.signal is not None:
        return KILLED, reason or f"{end.signal} ended rank {end.rank}"
    return FAILED, reason or f"exit code {end.exit_code} before the run began; see its log"


def _of_silence(
    attempts: Sequence[Start | End], status: Mapping[str, Any], last_word: str | None, job: str | None
) -> tuple[str, str | None]:
    """The cluster no longer has it, and nobody wrote down its end."""
    says = f"; Slurm says {last_word}" if last_word else ""
    if not attempts and job is None:
        return PENDING, "not submitted; resume submits it"
    if not attempts:
        return OF_SLURM.get(last_word or "", KILLED), f"job {job} ended before the trial began{says}"
    if status.get("state") == "failed":
        out_of_memory = "out of memory" in str(status.get("reason"))
        broken = OF_EXIT_CODE.get(int(status.get("exit_code") or 0), FAILED)
        return (OUT_OF_MEMORY if out_of_memory else broken), status.get("reason")
    return OF_SLURM.get(last_word or "", KILLED), f"its job ended without a word: killed, or the node went down{says}"


def _written(status: Mapping[str, Any]) -> float:
    """When a `status.json` was written [seconds since the epoch, rounded up]; infinity if it does not say."""
    try:
        return datetime.strptime(status["updated"], "%Y-%m-%dT%H:%M:%S%z").timestamp() + 1
    except (KeyError, ValueError):
        return math.inf


# ---------------------------------------------------------------------- files of a run


def last_metrics(path: Path) -> dict[str, float]:
    """The last value of each metric in a `metrics.jsonl`: of its last part, and of the last line with an evaluation."""
    metrics: dict[str, float] = {}
    try:
        content = path.read_bytes()
    except OSError:
        return metrics
    last_evaluation = content.rfind(b', "val/')  # and not the evidence of a verdict, `{"val/`
    first = content.rfind(b"\n", 0, last_evaluation) + 1 if last_evaluation >= 0 else len(content)
    lines = [content[first:].partition(b"\n")[0], *content[-TAIL_BYTES:].splitlines()]
    for line in lines:
        with contextlib.suppress(ValueError, AttributeError):  # the first may be cut off, and so may the last
            values = json.loads(line)
            metrics |= {key: value for key, value in values.items() if "/" in key and isinstance(value, int | float)}
    return metrics


def innermost_frame(log: Path, manifest: Manifest) -> str | None:
    """Where the last traceback of a `train.log` comes from: the innermost frame outside of installed packages."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return None
    start = text.rfind("Traceback (most recent call last)")
    if start < 0:
        return None
    lines = text[start:].splitlines()
    frames = re.findall(r'File "([^"]+)", line (\d+)', "\n".join(lines))
    own = [frame for frame in frames if "site-packages" not in frame[0] and "/lib/python" not in frame[0]]
    errors = [line for line in lines[1:] if re.match(r"[\w.]+(: |$)", line)]
    if not own or not errors:
        return None
    file, number = own[-1]
    for snapshot in manifest.snapshots:
        file = file.removeprefix(f"{manifest.folder / snapshot.folder}/")
    return f"{file}:{number}: {errors[0]}"
