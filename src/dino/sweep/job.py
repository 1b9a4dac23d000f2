"""What runs in a job: a light process that starts the training of one trial, watches it, and writes down its end.

python -m dino.sweep.job SWEEP TRIAL SUBMISSION, once for each rank; imports no torch.
"""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from dino.exits import EXIT_BAD_CONFIGURATION, EXIT_COLLAPSED, EXIT_PREEMPTED
from dino.messages import quoted
from dino.processes import Processes
from dino.run import read_status
from dino.sweep.attempts import End, Start, now, read_attempts, record
from dino.sweep.environment import child_environment
from dino.sweep.manifest import Manifest, Submission, Trial, lock
from dino.sweep.requeue import CANCELLED, PREEMPTED, TIME_LIMIT, JobState, Outcome, SlurmJob, lead_of_warning_s
from dino.sweep.snapshot import digest
from dino.sweep.training_process import Ended, Signals, train

LOCK = ".job.lock"
LOCK_WAIT_S, LOCK_WAIT_OF_RESTARTED_S = 10, 120  # a file server may hold the lock of a node that died for a while
MAX_FRUITLESS = 3  # attempts in a row that the time limit ends before a single step
MAX_FRUITLESS_OF_RANKS = 10  # srun ends rank 0 like a preemption when another rank is gone without a word
MANIFEST_WAIT_S = 60  # a file server may show a node an old one for a while
TIME_TO_REQUEUE_S = 5  # ahead of the deadline of a job


def run_trial(sweep: Path, trial_id: str, submission_id: str) -> int:
    """Runs a trial as far as this job can, and says with which exit code the job is to end.

    0: finished, or nothing to do. 75: preempted; in Slurm the job comes back by itself, unless `attempts.jsonl` says
    why not. Any other: that of the training process, or 137 for one that was killed.

    Raises:
        ValueError: there is no such sweep, trial or submission.
    """
    signals = Signals()
    deadline = time.monotonic() + (MANIFEST_WAIT_S if SlurmJob.here(os.environ) else 0)
    while True:
        manifest = Manifest.read(sweep)
        submission = next((item for item in manifest.submissions if item.id == submission_id), None)
        if submission is not None:
            break
        if time.monotonic() > deadline:
            raise ValueError(f"{submission_id}: no such submission in {manifest.folder}")
        time.sleep(1)
    supervisor = Supervisor(manifest, manifest.trial(trial_id), submission, signals)
    return supervisor.run()


@dataclass
class Supervisor:
    """The process that watches over the training process of one rank."""

    manifest: Manifest
    trial: Trial
    submission: Submission
    signals: Signals
    job: SlurmJob | None = field(default_factory=lambda: SlurmJob.here(os.environ))

    def __post_init__(self) -> None:
        self.processes = Processes.from_environment(dict(os.environ))
        self.directory = self.manifest.directory(self.trial)
        self.code = self.manifest.code(self.submission)
        self.cluster = self.manifest.cluster
        self._seen: JobState | None = None  # when the first signal came

    def run(self) -> int:
        if self._nothing_to_do():
            return 0
        with self._locked() as alone:
            if not alone:
                self._say("another process works on this trial; nothing is done here")
                return 0
            if self._nothing_to_do():
                return 0
            if digest(self.code) != self.manifest.snapshots[self.submission.snapshot].digest:
                reason = f"{self.code} is no longer what was submitted; submit the trial again"
                self._say(reason)
                self._record(Ended(EXIT_BAD_CONFIGURATION), Outcome(None, requeued=False, reason=reason))
                return EXIT_BAD_CONFIGURATION
            self._warn_of_few_cores()
            while True:
                code, again = self._attempt()
                if not again:
                    return code

    # ------------------------------------------------------------------ one attempt

    def _attempt(self) -> tuple[int, bool]:
        """The exit code of the job, and whether another attempt is to follow at once."""
        if self.processes.is_main:
            self._record_start()
        source = Path(self.manifest.snapshots[self.submission.snapshot].source)
        cwd = Path(self.manifest.cwd)
        ended = train(
            [sys.executable, *frozen_command(self.code, self.directory)],
            environment=child_environment(os.environ, self.code, source, cwd),
            cwd=cwd,
            signals=self.signals,
            when_signalled=self._look_at_job,
        )
        if ended.exit_code == 0:
            if self.processes.is_main:
                self._record(ended)
            return 0, False
        # With several ranks, the others may have left before this one listened; then it loses its connection to them.
        if ended.preempted or (self.signals.received and self.processes.several):
            return self._after_preemption(ended), False
        return self._after_failure(ended)

    def _after_preemption(self, ended: Ended) -> int:
        if not self.processes.is_main:
            return 0  # anything else would make srun kill rank 0 before it has requeued the job
        outcome = self._outcome_of_preemption()
        if ended.too_slow and outcome.reason is None:
            said = "it did not save in time and was killed; it goes on from its newest checkpoint"
            outcome = replace(outcome, reason=said)
        self._record(replace(ended, preempted=True), outcome)
        self._say(f"{outcome.cause}, {'requeued' if outcome.requeued else 'not requeued'}: {outcome.reason}")
        return EXIT_PREEMPTED

    def _outcome_of_preemption(self) -> Outcome:
        cancelled = self.manifest.cancelled(self.trial)
        if cancelled is not None:
            return Outcome(CANCELLED, requeued=False, reason=cancelled)
        if self.job is None:
            return Outcome(PREEMPTED, requeued=False)
        broken = self._failed_rank()
        if broken is not None:  # srun ends the others then
            return Outcome(None, requeued=False, reason=f"rank {broken} failed")
        at = self.signals.received[0][1] if self.signals.received else time.time()
        lead_s = lead_of_warning_s(self.cluster["signal_lead_s"], self.cluster["time_min"])
        cause = self.job.cause(self._seen or self.job.state(), at=at, lead_s=lead_s)
        if cause == TIME_LIMIT and self._fruitless() >= MAX_FRUITLESS:
            short = f"{MAX_FRUITLESS} attempts in a row did not reach a single step; raise cluster.time_min"
            return Outcome(cause, requeued=False, reason=short)
        if self.processes.several and self._fruitless() >= MAX_FRUITLESS_OF_RANKS:
            stuck = f"{MAX_FRUITLESS_OF_RANKS} attempts in a row did not reach a single step; see the logs of its ranks"
            return Outcome(cause, requeued=False, reason=stuck)
        return self.job.requeue(cause, int(self.cluster["max_num_requeues"]))

    def _after_failure(self, ended: Ended) -> tuple[int, bool]:
        policy, _, times = str(self.manifest.sweep.get("on_failure", "continue")).partition(":")
        in_vain = (EXIT_BAD_CONFIGURATION, EXIT_COLLAPSED)
        may_retry = ended.code not in in_vain and self.manifest.cancelled(self.trial) is None
        again, outcome = False, None
        if policy == "retry" and may_retry and self._num_failures() < int(times):
            if not self.processes.several:
                again = True
            elif self.job is not None:  # by itself no rank could start again
                outcome = self.job.requeue(None, int(self.cluster["max_num_requeues"]))
        self._record(ended, outcome)
        if policy == "stop":
            self._stop_others()
        how = ended.signal or f"exit code {ended.code}"
        self._say(f"failed with {how}" + (", and is started again" if again else ""))
        return ended.code, again

    def _stop_others(self) -> None:
        from dino.sweep.clusters import cluster_of  # only here, since it imports much

        self.manifest = Manifest.read(self.manifest.folder)  # a search may have added trials
        open_states = [read_status(self.manifest.directory(trial)).get("state") for trial in self.manifest.trials]
        others = [
            trial
            for trial, state in zip(self.manifest.trials, open_states, strict=True)
            if trial.id != self.trial.id and state not in ("finished", "failed")
        ]
        others = [trial for trial in others if self.manifest.cancelled(trial) is None]
        self.manifest.mark_cancelled(others, f"trial {self.trial.id} failed and sweep.on_failure=stop")
        try:
            cluster_of(self.manifest).cancel(self.manifest, others)
        except ValueError as error:  # they are marked, and will not begin again
            self._say(f"the others could not be stopped: {error}")

    # ------------------------------------------------------------------ looking around

    def _nothing_to_do(self) -> bool:
        cancelled = self.manifest.cancelled(self.trial)
        if cancelled is not None:
            self._say(f"cancelled: {cancelled}")
        return cancelled is not None or read_status(self.directory).get("state") == "finished"

    def _look_at_job(self) -> float | None:
        """When the training process has to have ended, so that there is time to requeue the job."""
        if self.job is None or not self.processes.is_main:
            return None
        self._seen = seen = self.job.state()
        if seen is None or seen.end is None or seen.state != "RUNNING" or seen.preempted:
            return None
        return seen.end - TIME_TO_REQUEUE_S

    def _failed_rank(self) -> int | None:
        """Another rank of this attempt that has written down a failure of its own."""
        failed = None
        for attempt in read_attempts(self.directory):
            if isinstance(attempt, Start):
                failed = None
            elif attempt.exit_code not in (0, EXIT_PREEMPTED):
                failed = attempt.rank
        return failed

    def _fruitless(self) -> int:
        """How many attempts in a row, this one included, have ended at the step at which they began, asked to stop.

        With one rank only those that the time limit has ended.
        """
        step, count = self._step(), 0
        attempts = [item for item in read_attempts(self.directory) if item.submission == self.submission.id]
        for attempt in reversed(attempts):
            if isinstance(attempt, Start):
                if attempt.step != step:
                    break
                count += 1
            elif attempt.cause != TIME_LIMIT and not (self.processes.several and attempt.exit_code == EXIT_PREEMPTED):
                break
        return count

    def _num_failures(self) -> int:
        """Of earlier attempts of this submission; that several ranks failed counts once."""
        count, failed = 0, False
        for attempt in read_attempts(self.directory):
            if attempt.submission != self.submission.id:
                continue
            if isinstance(attempt, Start):
                count, failed = count + failed, False
            elif attempt.exit_code not in (0, EXIT_PREEMPTED):
                failed = True
        return count

    def _step(self) -> int:
        return int(read_status(self.directory).get("step") or 0)

    def _warn_of_few_cores(self) -> None:
        wanted, usable = int(os.environ.get("SLURM_CPUS_PER_TASK", 0)), len(os.sched_getaffinity(0))
        if usable < wanted:
            self._say(f"warning: only {usable} cores are usable, though cluster.cpus_per_task={wanted}")

    # ------------------------------------------------------------------ writing down

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        """Whether this is the only process on its rank of the trial."""
        name = LOCK if self.processes.is_main else f"{LOCK}.{self.processes.rank}"
        wait_s = LOCK_WAIT_OF_RESTARTED_S if self.job is not None and self.job.restart else LOCK_WAIT_S
        with lock(self.directory / name, wait_s=wait_s) as held:
            yield held is not None

    def _record_start(self) -> None:
        start = Start(
            time=now(),
            submission=self.submission.id,
            job=self.job.id if self.job else None,
            restart=self.job.restart if self.job else 0,
            host=socket.gethostname(),
            pid=os.getpid(),
            step=self._step(),
        )
        record(self.directory, start)

    def _record(self, ended: Ended, outcome: Outcome | None = None) -> None:
        end = End(
            time=now(),
            submission=self.submission.id,
            rank=self.processes.rank,
            exit_code=EXIT_PREEMPTED if ended.preempted else ended.exit_code,
            signal=ended.signal,
            out_of_memory=ended.out_of_memory,
            cause=outcome.cause if outcome else None,
            requeued=outcome.requeued if outcome else False,
            reason=outcome.reason if outcome else None,
            step=self._step(),
        )
        record(self.directory, end)

    def _say(self, text: str) -> None:
        print(f"{self.trial.id}: {text}", flush=True)


def frozen_command(code: Path, directory: Path) -> list[str]:
    """The script and its arguments; the directory is where the sweep is now, wherever it was frozen."""
    return [str(code / "train.py"), "--frozen", str(directory / "config.yaml"), f"run_dir={quoted(str(directory))}"]


if __name__ == "__main__":
    folder, trial_name, submission_name = sys.argv[1:]
    try:
        raise SystemExit(run_trial(Path(folder), trial_name, submission_name))
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(EXIT_BAD_CONFIGURATION) from None
