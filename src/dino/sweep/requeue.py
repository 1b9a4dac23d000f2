"""A Slurm job seen from inside: what is happening to it, and whether and how it comes back."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from dino.sweep.slurm_commands import TEMPORARY, slurm

WARNING_SLACK_S = 60.0  # Slurm looks for jobs near their limit twice a minute, and warns them up to a minute early
LARGEST_SHARE_OF_LIMIT = 0.25  # that the warning may take
WAITS_S = (0, 1, 2, 4, 8, 15, 30)  # before each time that the controller is asked

TIME_LIMIT, PREEMPTED, CANCELLED, SCHEDULER = "time limit", "preempted", "cancelled", "scheduler"


@dataclass(frozen=True)
class JobState:
    """What the controller says of a job.

    Attributes:
        state: a job that Slurm ends, for whatever reason, is COMPLETING as long as its processes live.
        reason: TimeLimit where that ends it.
        restarts: counted up at once when the job is requeued, while its processes still live.
        end: of the time limit, or of the grace time of a preemption [seconds since the epoch].
        preempted: whether another job takes its place.
    """

    state: str
    reason: str
    restarts: int
    end: float | None
    preempted: bool


@dataclass(frozen=True)
class Outcome:
    """What becomes of a job whose training was asked to stop; the fields are those of `dino.sweep.attempts.End`."""

    cause: str | None
    requeued: bool
    reason: str | None = None


@dataclass(frozen=True)
class SlurmJob:
    """The job that this process is part of.

    Attributes:
        id: as squeue shows it.
        restart: how often it was started before.
    """

    id: str
    restart: int

    @classmethod
    def here(cls, environment: Mapping[str, str]) -> "SlurmJob | None":
        if "SLURM_JOB_ID" not in environment:
            return None
        name = environment["SLURM_JOB_ID"]
        if "SLURM_ARRAY_JOB_ID" in environment:
            name = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
        return cls(name, int(environment.get("SLURM_RESTART_COUNT", 0)))

    def state(self) -> JobState | None:
        """None if the controller does not answer, or does not know the job."""
        answer = slurm("scontrol", "--oneliner", "show", "job", self.id)
        values = dict(re.findall(r"(?<!\S)(JobState|Reason|Restarts|EndTime|PreemptTime)=(\S+)", answer.stdout))
        if answer.returncode != 0 or "JobState" not in values:
            return None
        return JobState(
            state=values["JobState"],
            reason=values.get("Reason", ""),
            restarts=int(values.get("Restarts", 0)),
            end=_seconds(values.get("EndTime", "")),
            preempted=_seconds(values.get("PreemptTime", "")) is not None,
        )

    def cause(self, seen: JobState | None, *, at: float, lead_s: float) -> str:
        """Why a signal came at the time `at`, when the controller said `seen`."""
        if seen is None or seen.restarts > self.restart:
            return PREEMPTED
        if seen.reason == "TimeLimit":
            return TIME_LIMIT
        near_end = seen.end is not None and at >= seen.end - lead_s - WARNING_SLACK_S
        return TIME_LIMIT if near_end and not seen.preempted else PREEMPTED

    def requeue(self, cause: str | None, max_num_requeues: int) -> Outcome:
        """Asks for another start, unless Slurm gives one anyway, somebody has cancelled the job, or its budget is used.

        Returns at once; the processes of the job are to end now.
        """
        refusal = "the controller does not answer"
        for wait_s in WAITS_S:
            time.sleep(wait_s)
            now = self.state()
            if now is None:
                continue
            if now.restarts > self.restart:
                return Outcome(SCHEDULER if cause == PREEMPTED else cause, requeued=True)
            if now.state != "RUNNING" and now.reason != "TimeLimit":
                return Outcome(CANCELLED, requeued=False, reason=f"Slurm ends job {self.id}; somebody cancelled it")
            if self.restart >= max_num_requeues:
                used_up = f"{max_num_requeues} requeues used up (cluster.max_num_requeues={max_num_requeues})"
                return Outcome(cause, requeued=False, reason=used_up)
            answer = slurm("scontrol", "requeue", self.id)
            if answer.returncode == 0:
                return Outcome(cause, requeued=True)
            refusal = answer.stderr.strip()
            # Killed, or "pending": Slurm requeues the job already, and the next look shows it.
            if answer.returncode > 0 and not (TEMPORARY.search(refusal) or "pending" in refusal):
                break
        return Outcome(cause, requeued=False, reason=f"scontrol requeue {self.id}: {refusal}")


def lead_of_warning_s(signal_lead_s: int, time_min: int) -> int:
    """How long before its limit a job is really warned; a short job would otherwise be warned as it starts [s]."""
    return min(signal_lead_s, int(time_min * 60 * LARGEST_SHARE_OF_LIMIT))


def _seconds(text: str) -> float | None:
    """A time as scontrol writes it, in this machine's zone; None for `None`, `Unknown` and the like."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None
