"""`python train.py -m hydra/launcher=slurm ...`: the points of Hydra's multirun as jobs, or as processes.

Inside a trial the guarantees are those of `sweep.py`: it saves when it is asked to stop, its job is requeued within
`cluster.max_num_requeues`, and Slurm says FAILED when it failed. What happens to one trial is hidden from no other: the
command waits for all, then names those that failed.
"""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher
from omegaconf import OmegaConf

from dino import preemption
from dino.config import build
from dino.exits import EXIT_INTERRUPTED, EXIT_PREEMPTED
from dino.messages import quoted
from dino.processes import Processes
from dino.sweep.environment import cleaned_process
from dino.sweep.requeue import SlurmJob, lead_of_warning_s
from dino.sweep.slurm_commands import RUNNING, WAITING, explained, queue

ASK_EVERY_S = 10.0  # the controller, for jobs that are gone without a result

Point = tuple[list[str], str, int, str, dict[type, Singleton]]  # what the plugin calls itself with in the job


class ClusterLauncher(BaseSubmititLauncher):  # type: ignore[misc]  # the plugin has no types
    """A launcher whose settings are those of `conf/cluster`.

    Args:
        cluster: the settings, as in the config.
        folder: scripts, pickles and logs.
    """

    def __init__(self, cluster: Any, folder: str) -> None:
        super().__init__()
        self.settings = OmegaConf.create({"cluster": cluster})
        self.folder = Path(folder).absolute()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Hands all points over, and waits until each has ended."""
        from dino.launch import answering_bad_values, failed_points

        points: list[Point] = [
            (list(overrides), "hydra.sweep.dir", number, f"job_id_for_{number}", Singleton.get_state())
            for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        with answering_bad_values(), cleaned_process():
            results = self.run(build(self.settings, "cluster"), points)
        returns: list[JobReturn] = []
        for point, result in zip(points, results, strict=True):
            if isinstance(result, str):
                failed_points.append(f"  {described(point)}: {result}")
            # One that failed as well: the sweep goes on, and the command says at its end that it did.
            returns.append(JobReturn(overrides=point[0], status=JobStatus.COMPLETED))
        return returns

    @abstractmethod
    def run(self, cluster: Any, points: Sequence[Point]) -> list[str | None]:
        """For each point, why it failed; None for one that finished."""


class SlurmArrays(ClusterLauncher):
    """Arrays of Slurm jobs. The command waits for them, which may take days; `sweep.py submit` does not."""

    def run(self, cluster: Any, points: Sequence[Point]) -> list[str | None]:
        from submitit.core.utils import FailedJobError

        from dino.sweep.slurm import SlurmCluster

        if not isinstance(cluster, SlurmCluster):
            raise ValueError(
                "hydra/launcher=slurm: its jobs are those of cluster=slurm, or of a site's file that builds on it"
            )
        cluster.check()
        jobs: list[Any] = []
        for part in cluster.arrays(points):
            executor = cluster.executor(self.folder, str(self.config.hydra.job.name), "")
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats what sbatch says
                    jobs += executor.map_array(self, *zip(*part, strict=True))
            except FailedJobError as error:
                others = f"; these jobs go on: {' '.join(job.job_id for job in jobs)}" if jobs else ""
                raise ValueError(explained(str(error), cluster.settings) + others) from None
        for job, point in zip(jobs, points, strict=True):
            print(f"job {job.job_id}  {described(point)}", flush=True)
        return self._collected(jobs)

    def _collected(self, jobs: Sequence[Any]) -> list[str | None]:
        """A job that twice in a row is neither in the queue nor has left a result is lost."""
        results: dict[str, str | None] = {}
        missing: set[str] = set()
        asked = time.monotonic()
        while len(results) < len(jobs):
            open_jobs = {job.job_id: job for job in jobs if job.job_id not in results}
            results |= {name: failure(job) for name, job in open_jobs.items() if job.paths.result_pickle.exists()}
            if time.monotonic() > asked + ASK_EVERY_S:
                asked, gone = time.monotonic(), jobs_gone(set(open_jobs) - set(results))
                lost = missing & set(gone)
                results |= {name: f"no result; Slurm says {gone[name]}; {log_of(open_jobs[name])}" for name in lost}
                missing = set(gone)
            if preemption.requested():
                print(f"the jobs go on, in {self.folder.parent}; scancel ends them", flush=True)
                raise SystemExit(EXIT_INTERRUPTED)
            time.sleep(0.5)
        return [results[job.job_id] for job in jobs]

    def __call__(self, sweep_overrides: list[str], *others: Any) -> JobReturn:
        """In the job: one point. A failure becomes its result, and the job ends as failed."""
        # submitit's own handlers would count time limits, and start the point again in their own way.
        for number in preemption.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        preemption.listen()
        processes = Processes.from_environment()
        if not processes.is_main:
            sweep_overrides = [*sweep_overrides, "hydra.output_subdir=null"]  # rank 0 writes it
        try:
            returned: JobReturn = super().__call__(sweep_overrides, *others)
        except SystemExit as stop:
            if stop.code != EXIT_PREEMPTED:
                raise RuntimeError(f"exit code {stop.code}") from None
            if processes.is_main:
                self._requeue()
            raise SystemExit(EXIT_PREEMPTED if processes.is_main else 0) from None
        return returned

    def _requeue(self) -> None:
        """Raises `RuntimeError`, which becomes the result, where the job does not come back."""
        job, cluster = SlurmJob.here(os.environ), self.settings.cluster
        assert job is not None
        lead_s = lead_of_warning_s(cluster.signal_lead_s, cluster.time_min)
        outcome = job.requeue(job.cause(job.state(), at=time.time(), lead_s=lead_s), cluster.max_num_requeues)
        if not outcome.requeued:
            raise RuntimeError(f"exit code {EXIT_PREEMPTED}, {outcome.cause}, not requeued: {outcome.reason}")


class LocalPool(ClusterLauncher):
    """Processes of this machine: so many at once as `conf/cluster/local.yaml` says, each on a device of its own.

    Each is a `python train.py` of its own. A signal to the command is handed on to them, and it waits until they have
    saved.
    """

    def run(self, cluster: Any, points: Sequence[Point]) -> list[str | None]:
        from dino.sweep.local import LocalCluster

        if not isinstance(cluster, LocalCluster):
            raise ValueError("hydra/launcher=local: its processes are those of cluster=local; leave cluster=... out")
        free: list[str | None] = cluster.slots()
        num_threads = cluster.num_threads(len(free))
        waiting = list(points)
        running: dict[int, tuple[subprocess.Popen[bytes], str | None]] = {}
        codes: dict[int, int] = {}
        told = False
        while running or (waiting and not told):
            if preemption.requested() and not told:
                told = True
                for process, _ in running.values():
                    process.terminate()
            while waiting and free and not told:
                point, device = waiting.pop(0), free.pop(0)
                running[point[2]] = self._start(point, device, num_threads), device
            for number, (process, device) in list(running.items()):
                code = process.poll()
                if code is not None:
                    codes[number] = code
                    free.append(device)
                    del running[number]
            time.sleep(0.1)
        if told:
            raise SystemExit(EXIT_PREEMPTED)
        return [f"exit code {codes[point[2]]}; see {self._log(point)}" if codes[point[2]] else None for point in points]

    def _start(self, point: Point, device: str | None, num_threads: int | None) -> subprocess.Popen[bytes]:
        directory = Path(self.config.hydra.sweep.dir, str(point[2])).absolute()
        environment = dict(os.environ)
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        if num_threads is not None:
            environment["OMP_NUM_THREADS"] = str(num_threads)
        print(f"begins  {described(point)}", flush=True)
        with self._log(point).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, sys.argv[0], *point[0], f"run_dir={quoted(str(directory))}"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C comes from here alone
                preexec_fn=preemption.follow_parent,
            )

    def _log(self, point: Point) -> Path:
        return self.folder / f"{point[2]}.log"


def described(point: Point) -> str:
    return f"#{point[2]} {' '.join(filter_overrides(point[0]))}"


def log_of(job: Any) -> str:
    return f"see {job.paths.stderr}"


def jobs_gone(jobs: set[str]) -> dict[str, str]:
    """Those of the jobs that neither wait nor run, with Slurm's last word; none if it does not answer."""
    known = queue()
    if known is None:
        return {}
    states = {job.id: job.state for job in known}
    last = {job: states.get(job, "nothing any more") for job in jobs}
    return {job: state for job, state in last.items() if state not in (*WAITING, *RUNNING)}


def failure(job: Any) -> str | None:
    """Why a job failed that has left a result; None if it did not."""
    from submitit.core.utils import pickle_load

    outcome, result = pickle_load(job.paths.result_pickle)
    return None if outcome == "success" else f"{str(result).strip().splitlines()[-1]}; {log_of(job)}"
