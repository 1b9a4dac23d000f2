"""Trials as jobs of a real Slurm: what becomes of them under signals, requeues, limits, refusals and lost nodes.

The trials run small programs in place of train.py, so that each case shows within seconds.
"""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from handmade_sweep import FINISHES, WAITS, ends, environments, handmade_sweep, starts
from sweep_command import until

from dino.sweep.attempts import End
from dino.sweep.manifest import Manifest
from dino.sweep.slurm import SlurmCluster
from dino.sweep.slurm_commands import queue

RETURNS = f"if attempt > 1:\n    {FINISHES}    sys.exit(0)\n"  # after one requeue
STUCK = "when_asked(lambda name: None)\nstatus('running', 1)\ntime.sleep(300)\n"


@dataclass
class Lab:
    """The cluster, and sweeps of handmade programs on it."""

    folder: Path
    environment: dict[str, str]
    sweeps: list[Manifest] = field(default_factory=list)

    def sweep(self, program: str, count: int = 1, on_failure: str = "continue", **cluster: Any) -> Manifest:
        settings = {"time_min": 60, "signal_lead_s": 30, "max_num_requeues": 100, "cpus_per_task": 1} | cluster
        node = {"_target_": "dino.sweep.slurm.SlurmCluster", **settings}
        folder = self.folder / f"s{len(self.sweeps)}"
        manifest = handmade_sweep(folder, program, count, sweep={"on_failure": on_failure}, cluster=node)
        self.sweeps.append(manifest)
        return manifest

    def cluster(self, manifest: Manifest) -> SlurmCluster:
        return SlurmCluster(**{key: value for key, value in manifest.cluster.items() if key != "_target_"})

    def submit(self, program: str, count: int = 1, on_failure: str = "continue", **cluster: Any) -> Manifest:
        manifest = self.sweep(program, count, on_failure, **cluster)
        self.cluster(manifest).submit(manifest, manifest.trials, 0)
        return manifest

    def slurm(self, *words: str) -> str:
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done
        return done.stdout

    def job(self, manifest: Manifest, number: int = 0) -> str:
        return manifest.submissions[-1].jobs[manifest.trials[number].id]

    def until_running(self, manifest: Manifest, attempt: int = 1) -> None:
        """The program of the first trial, for this time."""
        status = manifest.directory(manifest.trials[0]) / "status.json"
        until(lambda: len(environments(manifest)) == attempt and status.exists() and "running" in status.read_text())

    def until_ended(self, manifest: Manifest, state: str, timeout: float = 120) -> None:
        """In the words of Slurm, for all trials."""
        cluster = self.cluster(manifest)
        expected = {trial.id: state for trial in manifest.trials}
        until(lambda: not cluster.live(manifest), timeout)
        assert cluster.ended(manifest) == expected


@pytest.fixture
def lab(slurm: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.setenv("SLURM_CONF", slurm["SLURM_CONF"])
    lab = Lab(tmp_path, slurm)
    yield lab
    for manifest in lab.sweeps:
        jobs = [job for submission in manifest.submissions for job in submission.jobs.values()]
        subprocess.run(["scancel", *jobs], env=slurm, capture_output=True)
    until(lambda: not lab.slurm("squeue", "-h"))


def summary(end: End) -> tuple[int | None, str | None, bool]:
    return end.exit_code, end.cause, end.requeued


# ---------------------------------------------------------------------- handing over


def test_sixty_trials_where_an_array_holds_twenty_five(lab: Lab) -> None:
    """The site says how many; every trial runs exactly once, and ends as Slurm sees it."""
    manifest = lab.submit(FINISHES, 60)
    assert [len(submission.trials) for submission in manifest.submissions] == [25, 25, 10]
    assert Manifest.read(manifest.folder).submissions == manifest.submissions
    lab.until_ended(manifest, "COMPLETED")
    assert [len(environments(manifest, number)) for number in range(60)] == [1] * 60
    names = {job for submission in manifest.submissions for job in submission.jobs.values()}
    assert {starts(manifest, number)[0].job for number in range(60)} == names


def test_at_most_so_many_at_once(lab: Lab) -> None:
    manifest = lab.submit("time.sleep(1)\n" + FINISHES, 5, max_parallel=2)
    most = 0

    def watch() -> bool:
        nonlocal most
        live = lab.cluster(manifest).live(manifest)
        assert live is not None
        most = max(most, Counter(item.state for item in live.values())["running"])
        return not live

    until(watch)
    assert most == 2


def test_a_poisoned_environment_changes_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    poison = {"SLURM_JOB_ID": "1", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SBATCH_PARTITION": "nowhere"}
    poison |= {"SLURM_NTASKS": "8", "SBATCH_EXPORT": "NONE", "SLURM_ARRAY_TASK_ID": "7", "SQUEUE_FORMAT": "%t"}
    ranks = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1", "PMI_RANK": "3"}
    for name, value in {**poison, **ranks}.items():
        monkeypatch.setenv(name, value)
    manifest = lab.submit(FINISHES)
    lab.until_ended(manifest, "COMPLETED")
    (found,) = environments(manifest)
    assert not ranks.keys() & found.keys()
    assert "SLURM_CPU_BIND" not in found or found["SLURM_CPU_BIND"] != poison["SLURM_CPU_BIND"]
    assert (found["SLURM_JOB_ID"], found["SLURM_NTASKS"]) == (lab.job(manifest), "1")
    assert os.environ["RANK"] == "3", "the submitting process keeps its own"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"partition": "gpuu"}, "cluster.partition=gpuu: sbatch says .*[Ii]nvalid partition"),
        ({"constraint": "h200"}, "cluster.constraint=h200: sbatch says .*Invalid feature specification"),
        ({"cpus_per_task": 64}, "cluster.nodes=1, .*cluster.cpus_per_task=64, .*More processors requested"),
        ({"mem_gb": 900}, "cluster.mem_gb=900: sbatch says .*Memory"),
        ({"array_limit": 40}, "cluster.array_limit=40: sbatch says .*Invalid job array specification"),
        ({"reservation": "tuesday"}, "cluster.reservation=tuesday: sbatch says .*[Rr]eservation"),
        ({"nodelist": "n9"}, "cluster.nodelist=n9, cluster.exclude=null: sbatch says .*n9|Invalid node name"),
    ],
)
def test_what_the_site_refuses_is_said_at_once(lab: Lab, settings: dict[str, Any], message: str) -> None:
    manifest = lab.sweep(FINISHES, 30, **settings)
    with pytest.raises(ValueError, match=message):
        lab.cluster(manifest).submit(manifest, manifest.trials, 0)
    assert Manifest.read(manifest.folder).submissions == []
    assert lab.slurm("squeue", "-h") == ""


def test_a_machine_that_knows_no_cluster_says_so(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = lab.sweep(FINISHES)
    empty = lab.folder / "empty.conf"
    empty.touch()
    monkeypatch.setenv("SLURM_CONF", str(empty))
    with pytest.raises(ValueError, match=r"^cluster=slurm: sbatch knows no cluster on this machine; submit from"):
        lab.cluster(manifest).submit(manifest, manifest.trials, 0)


@pytest.mark.parametrize("accepted", [False, True])
def test_an_sbatch_without_an_answer_is_repeated_but_no_trial_submitted_twice(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, accepted: bool
) -> None:
    """The first call of sbatch fails as it does when the controller is busy: sometimes after it was heard."""
    real, folder = shutil.which("sbatch"), lab.folder / "bin"
    folder.mkdir()
    hears = f'"{real}" "$@" >/dev/null' if accepted else ":"
    script = f'[ -e "{folder}/called" ] && exec "{real}" "$@"\ntouch "{folder}/called"\n{hears}\n'
    complaint = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    (folder / "sbatch").write_text(f"#!/bin/bash\n{script}echo '{complaint}' >&2\nexit 1\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    manifest = lab.submit(FINISHES, 3, first_wait_s=0.5)
    lab.until_ended(manifest, "COMPLETED")
    assert [len(environments(manifest, number)) for number in range(3)] == [1, 1, 1]
    (submission,) = manifest.submissions
    assert [job.comment for job in queue() or ()].count(submission.id) == 3


def test_a_submission_whose_jobs_were_never_written_down_is_found(lab: Lab) -> None:
    """The submitting process died between sbatch and the manifest: the jobs run, are seen, and can be cancelled."""
    manifest = lab.submit(WAITS, 2)
    jobs = manifest.submissions[0].jobs
    manifest.submissions[0].jobs = {}
    manifest.write()
    lab.until_running(manifest)
    cluster, manifest = lab.cluster(manifest), Manifest.read(manifest.folder)
    live = cluster.live(manifest)
    assert live is not None
    assert {trial: item.job for trial, item in live.items()} == jobs
    manifest.mark_cancelled(manifest.trials, "by the test")
    cluster.cancel(manifest, manifest.trials)
    lab.until_ended(manifest, "CANCELLED")
    assert summary(ends(manifest)[0]) == (75, "cancelled", False)


# ---------------------------------------------------------------------- requeues


@pytest.mark.parametrize("how", ["USR2", "TERM", "requeue"])
def test_a_trial_that_is_stopped_comes_back(lab: Lab, how: str) -> None:
    manifest = lab.submit(RETURNS + WAITS, 2)
    lab.until_running(manifest)
    job = lab.job(manifest)
    lab.slurm("scontrol", "requeue", job) if how == "requeue" else lab.slurm("scancel", f"--signal={how}", job)
    until(lambda: len(starts(manifest)) == 2)
    assert summary(ends(manifest)[0]) == (75, "scheduler" if how == "requeue" else "preempted", True)
    until(lambda: len(ends(manifest)) == 2)
    first, second = starts(manifest)
    assert (first.job, first.restart, first.step) == (job, 0, 0)
    assert (second.job, second.restart, second.step) == (job, 1, 1)
    assert summary(ends(manifest)[1]) == (0, None, False)
    assert len(environments(manifest, 1)) == 1, "the other trial of the array is left alone"


def test_a_signal_while_python_starts_is_survived(lab: Lab) -> None:
    slow = lab.folder / "slow_python"
    slow.write_text(f'#!/bin/bash\ntouch {lab.folder}/starting\nsleep 2\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    manifest = lab.submit(FINISHES, python=str(slow))
    until(lambda: (lab.folder / "starting").exists())
    lab.slurm("scancel", "--signal=USR2", lab.job(manifest))
    lab.until_ended(manifest, "COMPLETED")
    assert [summary(end) for end in ends(manifest)] == [(0, None, False)]


def test_a_preempted_trial_comes_back(lab: Lab) -> None:
    """By a job of a partition with priority, which gives it a time of grace."""
    manifest = lab.submit(RETURNS + WAITS, nodelist="n1", additional_parameters={"exclusive": True})
    lab.until_running(manifest)
    lab.slurm("sbatch", "--partition=high", "--nodelist=n1", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    until(lambda: len(ends(manifest)) == 2)
    assert [summary(end) for end in ends(manifest)] == [(75, "preempted", True), (0, None, False)]


def test_a_job_that_somebody_cancels_stays_dead(lab: Lab) -> None:
    """Also in the moment before the training process listens."""
    early = lab.submit("time.sleep(100)")
    manifest = lab.submit(WAITS)
    lab.until_running(manifest)
    until(lambda: environments(early))
    lab.slurm("scancel", lab.job(manifest), lab.job(early))
    for each in (manifest, early):
        lab.until_ended(each, "CANCELLED")
        assert [summary(end) for end in ends(each)] == [(75, "cancelled", False)]
        assert len(environments(each)) == 1


def test_the_time_limit_of_a_minute(lab: Lab) -> None:
    """Warned by Slurm itself: one trial saves and comes back; one that does not listen is killed, and comes back."""
    manifest = lab.submit(RETURNS + WAITS, time_min=1, signal_lead_s=15)
    stuck = lab.submit(RETURNS + STUCK, time_min=1, signal_lead_s=15)
    for each in (manifest, stuck):
        until(lambda each=each: len(ends(each)) == 2, timeout=150)  # type: ignore[misc]
        assert [summary(end) for end in ends(each)] == [(75, "time limit", True), (0, None, False)]
    assert ends(manifest)[0].reason is None
    assert ends(stuck)[0].reason == "it did not save in time and was killed; it goes on from its newest checkpoint"
    assert ends(stuck)[0].signal == "SIGKILL"


@pytest.mark.parametrize(("time_min", "cause"), [(1, "time limit"), (5, "preempted")])
def test_a_budget_that_is_used_up(lab: Lab, time_min: int, cause: str) -> None:
    """And what a signal at the start of a job means: near a limit of one minute, and far from one of five."""
    manifest = lab.submit(WAITS, max_num_requeues=0, time_min=time_min, signal_lead_s=120)
    lab.until_running(manifest)
    lab.slurm("scancel", "--signal=USR2", lab.job(manifest))
    lab.until_ended(manifest, "FAILED")
    (end,) = ends(manifest)
    assert summary(end) == (75, cause, False)
    assert end.reason == "0 requeues used up (cluster.max_num_requeues=0)"


def test_a_site_that_does_not_requeue(lab: Lab) -> None:
    manifest = lab.submit(WAITS)
    lab.until_running(manifest)
    lab.slurm("scontrol", "update", f"jobid={lab.job(manifest)}", "requeue=0")
    lab.slurm("scancel", "--signal=USR2", lab.job(manifest))
    lab.until_ended(manifest, "FAILED")
    (end,) = ends(manifest)
    assert summary(end) == (75, "preempted", False)
    assert end.reason is not None
    assert end.reason.startswith(f"scontrol requeue {lab.job(manifest)}: Requested operation is presently disabled")


def test_a_limit_too_short_for_a_single_step(lab: Lab) -> None:
    manifest = lab.submit(
        "when_asked(lambda name: preempted(step=0))\nstatus('running', 0)\ntime.sleep(99)", time_min=1
    )
    for attempt in (1, 2, 3):
        lab.until_running(manifest, attempt)
        lab.slurm("scancel", "--signal=USR2", lab.job(manifest))
    lab.until_ended(manifest, "FAILED")
    assert [end.requeued for end in ends(manifest)] == [True, True, False], ends(manifest)
    assert ends(manifest)[-1].reason == "3 attempts in a row did not reach a single step; raise cluster.time_min"


def test_a_node_that_dies_and_comes_back(lab: Lab) -> None:
    manifest = lab.submit(RETURNS + WAITS, nodelist="n2")
    lab.until_running(manifest)
    up = {**lab.environment, "SLURMLAB_DIR": str(Path(lab.environment["SLURM_CONF"]).parent)}
    for command in ("kill-node", "start-node"):
        script = [str(Path(__file__).with_name("slurm-up.sh")), command, "n2"]
        subprocess.run(script, env=up, check=True, stdin=subprocess.DEVNULL)
    until(lambda: len(ends(manifest)) == 1, timeout=180)
    assert [start.restart for start in starts(manifest)] == [0, 1]
    assert summary(ends(manifest)[0]) == (0, None, False)


# ---------------------------------------------------------------------- failures, and several ranks


@pytest.mark.parametrize(("program", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_slurm_says_failed(lab: Lab, program: str, code: int) -> None:
    manifest = lab.submit(program)
    lab.until_ended(manifest, "FAILED")
    assert f"ExitCode={code}:0" in lab.slurm("scontrol", "show", "job", lab.job(manifest))


def test_one_failure_cancels_the_others(lab: Lab) -> None:
    fails = "if directory.name[:3] == '000':\n    while not list(directory.parent.glob('001*/status*')): pass\n"
    manifest = lab.submit(f"{fails}    sys.exit(1)\n{WAITS}", 12, on_failure="stop")
    until(lambda: not lab.cluster(manifest).live(manifest))
    # Slurm forgets a task of an array that is cancelled before it begins.
    words = lab.cluster(manifest).ended(manifest)
    assert words.pop(manifest.trials[0].id) == "FAILED"
    assert set(words.values()) == {"CANCELLED"}
    assert summary(ends(manifest, 1)[0]) == (75, "cancelled", False)
    assert sum(len(environments(manifest, number)) for number in range(12)) <= 8, "the others never began"


def test_the_ranks_of_a_trial_on_two_nodes(lab: Lab) -> None:
    """Both are warned; rank 0, which takes longer to save, brings the job back; the step tells them who they are."""
    together = (
        "while len(list(directory.glob(f'rank_*_{attempt}'))) < 2: (directory / f'rank_{rank}_{attempt}').touch()\n"
    )
    saves = (
        "when_asked(lambda name: (time.sleep(8 * (rank == 0)), preempted()))\nstatus('running', 1)\ntime.sleep(300)\n"
    )
    manifest = lab.submit(together + RETURNS + saves, nodes=2)
    lab.until_running(manifest)
    lab.slurm("scancel", "--signal=USR2", lab.job(manifest))
    lab.until_ended(manifest, "COMPLETED")
    assert [summary(end) for end in ends(manifest)] == [(75, "preempted", True), (0, None, False)]
    for rank in (0, 1):
        first, second = environments(manifest, rank=rank)
        assert first["SLURM_STEP_NUM_TASKS"] == second["SLURM_STEP_NUM_TASKS"] == "2"
        assert (first["SLURM_PROCID"], second["SLURM_RESTART_COUNT"]) == (str(rank), "1")


@pytest.mark.parametrize(
    ("program", "exit_code", "name"),
    [("sys.exit(1)", 1, None), ("os.kill(os.getpid(), signal.SIGKILL)", None, "SIGKILL")],
)
def test_a_rank_that_fails_ends_the_others(lab: Lab, program: str, exit_code: int | None, name: str | None) -> None:
    """Promptly, with its own failure on record; and the job is not brought back."""
    waits = "while not (directory / 'begun_0').exists(): time.sleep(0.1)\ntime.sleep(1)\n"
    manifest = lab.submit(f"if rank == 1:\n    exec({waits + program!r})\n{WAITS}", nodes=2)
    lab.until_ended(manifest, "FAILED", timeout=25)
    first = ends(manifest)[0]
    assert (first.rank, first.exit_code, first.signal) == (1, exit_code, name)
    assert not any(end.requeued for end in ends(manifest))
    assert len(environments(manifest)) == 1


def test_a_rank_that_fails_is_tried_again(lab: Lab) -> None:
    fails = "if rank == 1 and attempt == 1: sys.exit(1)\n"
    manifest = lab.submit(f"{fails}{RETURNS}{WAITS}", nodes=2, on_failure="retry:1")
    lab.until_ended(manifest, "COMPLETED")
    first = ends(manifest)[0]
    assert (first.rank, first.exit_code, first.requeued) == (1, 1, True)
    assert summary(ends(manifest)[-1]) == (0, None, False)


def test_the_script_is_shown_before_it_is_handed_over(lab: Lab) -> None:
    manifest = lab.sweep(
        FINISHES, 30, setup=["module load cuda || true"], mem_gb=1.5, reservation="tuesday", time_min=2
    )
    first, second = lab.cluster(manifest).scripts(manifest, manifest.trials)
    for line in ("--array=0-24%25", "--mem=1536M", "--requeue", "--signal=USR2@30", "--reservation=tuesday"):
        assert f"#SBATCH {line}\n" in first
    assert "#SBATCH --array=0-4%5\n" in second
    assert first.index("module load cuda") < first.index("export PYTHONPATH") < first.index("srun")
    assert lab.slurm("squeue", "-h") == ""
