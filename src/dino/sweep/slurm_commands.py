"""Slurm's commands, and what they answer. They run with no variable of another job."""

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dino.messages import show
from dino.preemption import SIGNALS
from dino.sweep.environment import cleaned

TIMEOUT_S = 60.0

# What a controller that is busy, restarting or out of reach says: the same command may succeed a moment later.
TEMPORARY = re.compile(
    r"timed out|temporar|try again|unable to contact|connection (refused|reset)|zero bytes were (transmitted|sent)"
    r"|communication|not responding|in standby|backup controller|slurm_receive_msg|socket|queue is full",
    re.IGNORECASE,
)

WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", "CONFIGURING")
# A job that completes may still be saving, and must not be started a second time.
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT")

NO_CLUSTER = re.compile(r"configuration (source|file)")  # neither slurm.conf nor a name server says where it is
ANSWERS_OF_SBATCH = {  # what it says, and which settings to look at
    r"partition": ("partition",),
    r"account": ("account", "partition"),
    r"qos|QOS": ("qos",),
    r"reservation": ("reservation",),
    r"array": ("array_limit",),
    r"time limit": ("time_min",),
    r"feature": ("constraint",),
    r"node name|Invalid node": ("nodelist", "exclude"),
    r"[Mm]emory": ("mem_gb",),
    r"gres|GRES": ("gpus_per_node",),
    r"node configuration|More processors|Node count|CPU count": (
        "nodes",
        "tasks_per_node",
        "cpus_per_task",
        "gpus_per_node",
        "mem_gb",
    ),
}


@dataclass(frozen=True)
class Queued:
    """A job or array task as squeue lists it: those that wait, those that run, and for some time those that ended.

    Attributes:
        id: such as `1234_0`.
        comment: as given to sbatch.
        reason: why it waits.
    """

    id: str
    state: str
    comment: str
    host: str
    reason: str

    @property
    def array_index(self) -> int:
        """0 for a job that is no array."""
        return int(self.id.partition("_")[2] or 0)


def slurm(*words: str, timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """Runs a command of Slurm; one that is missing or gives no answer counts as failed, with the reason in `stderr`.

    It ignores all signals that ask for an end, since Slurm sends them to every process of a job that it requeues: also
    to the very `scontrol requeue` that has just asked for it.
    """
    try:
        return subprocess.run(
            words,
            env=cleaned(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            preexec_fn=_ignore_signals,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 1, "", f"{words[0]} timed out after {timeout_s:g} s")
    except OSError as error:
        return subprocess.CompletedProcess(words, 1, "", str(error))


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def queue(user: str | None = None) -> list[Queued] | None:
    """All jobs of a user (None: this one) that the controller knows, tasks one by one; None if it cannot be asked."""
    fields = ("%i", "%T", "%k", "%N", "%r")
    asked = (
        "squeue",
        "--noheader",
        "--array",
        "--states=all",
        f"--user={user or os.getuid()}",
        f"--format={'|'.join(fields)}",
    )
    answer = slurm(*asked)
    if answer.returncode != 0:
        return None
    lines = [line.split("|", len(fields) - 1) for line in answer.stdout.splitlines()]
    return [Queued(*(part.strip() for part in line)) for line in lines if re.fullmatch(r"\d+(_\d+)?", line[0].strip())]


def cancel_jobs(jobs: Sequence[str]) -> None:
    """Raises `ValueError` if Slurm does not take the order."""
    for first in range(0, len(jobs), 500):  # a command line has a limit
        answer = slurm("scancel", *jobs[first : first + 500])
        if answer.returncode != 0 and TEMPORARY.search(answer.stderr):
            raise ValueError(f"scancel: {answer.stderr.strip()}; try again")


def explained(refusal: str, settings: Mapping[str, Any]) -> str:
    """What sbatch said, and the settings that it speaks of."""
    if NO_CLUSTER.search(refusal):
        return "cluster=slurm: sbatch knows no cluster on this machine; submit from a login node, or use cluster=local"
    for pattern, keys in ANSWERS_OF_SBATCH.items():
        if re.search(pattern, refusal):
            named = ", ".join(f"cluster.{key}={show(settings[key])}" for key in keys)
            return f"{named}: sbatch says {said(refusal)!r}; choose what this site offers"
    return f"cluster=slurm: sbatch says {said(refusal)!r}"


def said(refusal: str) -> str:
    """In one line."""
    lines = [line.removeprefix("sbatch: error: ") for line in refusal.strip().splitlines()]
    return "; ".join(line.removeprefix("Batch job submission failed: ") for line in lines) or "nothing"
