"""Trials as arrays of Slurm jobs: handed to sbatch by submitit, watched with squeue, cancelled with scancel."""

import contextlib
import io
import re
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dino.sweep.attempts import now
from dino.sweep.cluster import Cluster, Live
from dino.sweep.environment import cleaned_process
from dino.sweep.manifest import Manifest, Submission, Trial
from dino.sweep.requeue import lead_of_warning_s
from dino.sweep.slurm_commands import RUNNING, TEMPORARY, WAITING, Queued, cancel_jobs, explained, queue, said, slurm

Item = TypeVar("Item")

IGNORING_SIGNALS = 'trap "" TERM USR1 USR2; exec "$@"'
NO_LIMIT = 1_000_000
OWN_PARAMETERS = ("array", "comment", "error", "output", "requeue", "no-requeue", "signal")
USUAL_ARRAY_LIMIT = 1000  # where Slurm does not say its own


class RefusedError(ValueError):
    """Slurm does not take a job."""


class SlurmCluster(Cluster):
    """A Slurm cluster that can be reached from this machine; null leaves a setting to the site.

    Args:
        tasks_per_node: ranks of a trial on each node.
        mem_gb: on each node [GiB].
        time_min: limit of one job; a trial that takes longer is requeued [minutes].
        signal_lead_s: Slurm warns a job so long before its limit, at most a quarter of the limit [s].
        max_num_requeues: a trial's job may come back so often.
        max_parallel: so many trials of one array run at once.
        array_limit: largest number of trials in one array; None: as `scontrol show config` says.
        python: command that starts Python in the job; None: the one that submits.
        setup: lines of shell ahead of srun.
        srun_args: further arguments of srun.
        additional_parameters: further options of sbatch without the dashes; true for those without a value.
        num_attempts: how often sbatch is tried while Slurm does not answer.
        first_wait_s: before the second of these attempts; doubled each time [s].

    Raises:
        ValueError: naming the key.
    """

    def __init__(
        self,
        partition: str | None = None,
        account: str | None = None,
        qos: str | None = None,
        constraint: str | None = None,
        reservation: str | None = None,
        nodelist: str | None = None,
        exclude: str | None = None,
        nodes: int = 1,
        tasks_per_node: int = 1,
        gpus_per_node: int | None = None,
        cpus_per_task: int | None = None,
        mem_gb: float | None = None,
        time_min: int = 240,
        signal_lead_s: int = 120,
        max_num_requeues: int = 100,
        max_parallel: int | None = None,
        array_limit: int | None = None,
        python: str | None = None,
        setup: Sequence[str] = (),
        srun_args: Sequence[str] = (),
        additional_parameters: Mapping[str, Any] | None = None,
        num_attempts: int = 6,
        first_wait_s: float = 5.0,
    ) -> None:
        counts = {
            "nodes": nodes,
            "tasks_per_node": tasks_per_node,
            "cpus_per_task": cpus_per_task,
            "time_min": time_min,
            "max_parallel": max_parallel,
            "array_limit": array_limit,
            "num_attempts": num_attempts,
        }
        for key, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"cluster.{key}={count}: use a whole number of at least 1")
        for key, number in {"signal_lead_s": signal_lead_s, "max_num_requeues": max_num_requeues}.items():
            if number < 0:
                raise ValueError(f"cluster.{key}={number}: use a whole number of at least 0")
        ours = sorted(set(additional_parameters or {}) & set(OWN_PARAMETERS))
        if ours:
            raise ValueError(f"cluster.additional_parameters: {', '.join(ours)} cannot be set; the sweep needs its own")
        self.several_tasks = nodes * tasks_per_node > 1
        self.max_parallel = max_parallel
        self.array_limit = array_limit
        self.python = python or shlex.quote(sys.executable)
        self.max_num_requeues = max_num_requeues
        self.signal_lead_s = lead_of_warning_s(signal_lead_s, time_min)
        self.setup = tuple(setup)
        self.num_attempts = num_attempts
        self.first_wait_s = first_wait_s
        self.srun_args = ["--open-mode=append", *srun_args]
        if cpus_per_task is not None:
            self.srun_args.insert(0, f"--cpus-per-task={cpus_per_task}")  # Slurm 22.05 and later: not handed down
        if self.several_tasks:
            self.srun_args.insert(0, "--kill-on-bad-exit=1")
        same = {
            "partition": partition,
            "account": account,
            "qos": qos,
            "constraint": constraint,
            "nodelist": nodelist,
            "exclude": exclude,
            "nodes": nodes,
            "gpus_per_node": gpus_per_node,
            "cpus_per_task": cpus_per_task,
        }
        others = {"tasks_per_node": tasks_per_node, "mem_gb": mem_gb, "time_min": time_min, "reservation": reservation}
        self.settings: dict[str, Any] = {**same, **others, "array_limit": array_limit}
        self.parameters: dict[str, Any] = {  # as submitit calls them
            **same,
            "ntasks_per_node": tasks_per_node,
            "mem": None if mem_gb is None else f"{round(mem_gb * 1024)}M",
            "time": time_min,
            "signal_delay_s": self.signal_lead_s,
            "wckey": None,  # submitit names one of its own, which some sites refuse
        }
        reserved = {} if reservation is None else {"reservation": reservation}
        self.additional_parameters = {**reserved, **(additional_parameters or {}), "requeue": True}

    def check(self) -> None:
        for command in ("sbatch", "srun"):
            if shutil.which(command) is None:
                raise ValueError(
                    f"cluster=slurm: {command} is not on this machine; use cluster=local, or submit from a login node"
                )

    # ------------------------------------------------------------------ handing over

    def submit(self, manifest: Manifest, trials: Sequence[Trial], snapshot: int) -> None:
        self.check()
        for part in self.arrays(trials):
            submission = Submission(secrets.token_hex(8), now(), [trial.id for trial in part], snapshot)
            manifest.submissions.append(submission)
            manifest.write()
            try:
                job = self._sbatch(manifest, submission)
            except RefusedError:
                manifest.submissions.remove(submission)
                manifest.write()
                raise
            submission.jobs = dict(zip(submission.trials, _job_ids(job, len(part)), strict=True))
            manifest.write()

    def scripts(self, manifest: Manifest, trials: Sequence[Trial]) -> list[str]:
        self.check()
        snapshot = len(manifest.snapshots) - 1
        submissions = [
            Submission("SUBMISSION", now(), [trial.id for trial in part], snapshot) for part in self.arrays(trials)
        ]
        executors = [(self._executor(manifest, item), self._command(manifest, item)) for item in submissions]
        return [executor._make_submission_file_text(command, "") for executor, command in executors]

    def arrays(self, items: Sequence[Item]) -> list[Sequence[Item]]:
        """Cut to what one array holds."""
        limit = self.array_limit or site_array_limit()
        return [items[first : first + limit] for first in range(0, len(items), limit)]

    def executor(
        self, folder: Path, name: str, comment: str, *, setup: Sequence[str] = (), max_parallel: int | None = None
    ) -> Any:
        """submitit's, with all settings; scripts and logs of its jobs lie in `folder`."""
        import submitit

        executor = submitit.SlurmExecutor(folder, max_num_timeout=self.max_num_requeues, python=self.python)
        executor.update_parameters(
            **self.parameters,
            job_name=name,
            comment=comment,
            array_parallelism=min(limit or NO_LIMIT for limit in (self.max_parallel, max_parallel)),
            setup=[*self.setup, *setup],
            srun_args=self.srun_args,
            additional_parameters=self.additional_parameters,
        )
        return executor

    def _executor(self, manifest: Manifest, submission: Submission) -> Any:
        """Without submitit's pickles: what a job is to do stands in its script, complete as soon as sbatch has it."""
        executor = self.executor(
            manifest.folder / "jobs",
            manifest.name,
            submission.id,
            setup=_setup(manifest, submission),
            max_parallel=manifest.sweep.get("max_parallel"),
        )
        if len(submission.trials) > 1:
            executor.parameters["map_count"] = len(submission.trials)
        return executor

    def _command(self, manifest: Manifest, submission: Submission) -> str:
        """A signal that comes before Python listens would end the job as failed, and is ignored.

        -P: `dino` comes from PYTHONPATH, which names the snapshot, not from the folder of the submission.
        """
        trial = '"${trials[${SLURM_ARRAY_TASK_ID:-0}]}"'
        job = f"{self.python} -P -u -m dino.sweep.job {shlex.quote(str(manifest.folder))} {trial} {submission.id}"
        return f"bash -c {shlex.quote(IGNORING_SIGNALS)} bash {job}"

    def _sbatch(self, manifest: Manifest, submission: Submission) -> str:
        """The number of the job.

        Raises:
            RefusedError: Slurm does not take it.
            ValueError: it does not answer, and may have taken it all the same.
        """
        from submitit.core.utils import FailedJobError

        executor, command = self._executor(manifest, submission), self._command(manifest, submission)
        refusal = ""
        for attempt in range(self.num_attempts):
            if attempt:
                time.sleep(self.first_wait_s * 2 ** (attempt - 1))
                jobs = queue()
                if jobs is None:
                    continue
                taken = _found_by_comment(submission, jobs)
                if taken:  # an sbatch that timed out may have been heard
                    return next(iter(taken.values())).id.partition("_")[0]
            try:
                with cleaned_process(), contextlib.redirect_stderr(io.StringIO()):  # submitit repeats what sbatch says
                    return str(executor._submit_command(command).job_id)
            except FailedJobError as error:
                refusal = str(error)
            if not TEMPORARY.search(refusal):
                raise RefusedError(explained(refusal, self.settings))
        raise ValueError(f"sbatch: {said(refusal)}; {self.num_attempts} attempts (cluster.num_attempts), try later")

    # ------------------------------------------------------------------ watching and cancelling

    def live(self, manifest: Manifest) -> Mapping[str, Live] | None:
        jobs = queue(manifest.user) if shutil.which("squeue") else None
        if jobs is None:
            return None
        live: dict[str, Live] = {}
        for trial, job in _jobs_of(manifest, jobs):
            if job.state in WAITING:
                live[trial] = Live(state="pending", job=job.id, reason=job.reason)
            elif job.state in RUNNING:
                live[trial] = Live(state="running", job=job.id, host=job.host)
        return live

    def ended(self, manifest: Manifest) -> Mapping[str, str]:
        jobs = queue(manifest.user) if shutil.which("squeue") else None
        over = [(trial, job) for trial, job in _jobs_of(manifest, jobs or ()) if job.state not in (*WAITING, *RUNNING)]
        return {trial: job.state for trial, job in over}

    def cancel(self, manifest: Manifest, trials: Sequence[Trial]) -> None:
        live = self.live(manifest)
        if live is None:
            raise ValueError("cluster=slurm: squeue does not answer here; cancel from a login node")
        jobs = [live[trial.id].job for trial in trials if trial.id in live]
        cancel_jobs([job for job in jobs if job is not None])


def site_array_limit() -> int:
    """The largest number of tasks in an array."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", slurm("scontrol", "show", "config").stdout, re.MULTILINE)
    return max(1, int(found[1])) if found else USUAL_ARRAY_LIMIT


def _setup(manifest: Manifest, submission: Submission) -> list[str]:
    code = shlex.quote(str(manifest.code(submission) / "src"))
    return [
        f'export PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        f"trials=({' '.join(submission.trials)})",
    ]


def _job_ids(job: str, count: int) -> list[str]:
    return [f"{job}_{index}" for index in range(count)] if count > 1 else [job]


def _jobs_of(manifest: Manifest, jobs: Sequence[Queued]) -> list[tuple[str, Queued]]:
    """(trial, job), those of later submissions last."""
    by_id = {job.id: job for job in jobs}
    found: list[tuple[str, Queued]] = []
    for submission in manifest.submissions:
        if submission.jobs:
            found += [(trial, by_id[job]) for trial, job in submission.jobs.items() if job in by_id]
        else:
            found += _found_by_comment(submission, jobs).items()
    return found


def _found_by_comment(submission: Submission, jobs: Sequence[Queued]) -> dict[str, Queued]:
    return {submission.trials[job.array_index]: job for job in jobs if job.comment == submission.id}
