"""Hydra's own way to a sweep: `python train.py -m hydra/launcher=slurm`, on a real Slurm."""

import re
import subprocess
from pathlib import Path

from command_line import REPOSITORY, assert_same_run, finish, metrics, status
from omegaconf import OmegaConf
from sweep_command import SHORT, WorkingCopy, squeue, until

from dino.run import read_status

MINE = ["allowed_targets=[misbehaving]", "loss._target_=misbehaving.Misbehaving"]
ON_SLURM = ["-m", "hydra/launcher=slurm", "cluster.cpus_per_task=2", "hydra.sweep.dir=s", *SHORT]


def last_word(slurm: dict[str, str], job: str) -> str:
    words = ["squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T"]
    return subprocess.run(words, env=slurm, capture_output=True, text=True, check=True).stdout.strip()


def step(directory: Path) -> int:
    return int(read_status(directory).get("step", -1))


def test_one_point_that_fails_leaves_the_others_their_results(here: WorkingCopy, slurm: dict[str, str]) -> None:
    """One raises and one is killed: the command waits for all, names both, and exits with 1; Slurm says FAILED."""
    hows = ["raises", "fine", "is_killed", "nothing"]
    words = [*ON_SLURM, *MINE, f"+loss.how={','.join(hows)}"]
    result = here.run("train.py", *words, SLURM_JOB_ID="1", SBATCH_PARTITION="nowhere")
    assert result.returncode == 1, result
    points = [here.folder / "s" / str(number) for number in range(4)]
    assert [status(point)["state"] for point in points] == ["failed", "finished", "running", "finished"]
    assert "prototypes went missing" in (points[0] / "train.log").read_text()
    assert result.stderr.splitlines()[0] == "2 of the points failed:"
    raised, killed = result.stderr.splitlines()[1:3]
    assert "  #0 " in raised
    assert "+loss.how=raises: " in raised
    assert ": RuntimeError: exit code 1; see " in raised
    assert "+loss.how=is_killed: " in killed
    assert ": no result; Slurm says FAILED; see " in killed
    jobs = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("job ")]
    assert [last_word(slurm, job) for job in jobs] == ["FAILED", "COMPLETED", "FAILED", "COMPLETED"]


def test_the_command_of_the_readme(here: WorkingCopy) -> None:
    """Word by word, and then only smaller."""
    (line,) = re.findall(r"`python (train.py -m hydra/launcher=slurm [^`]+)`", (REPOSITORY / "README.md").read_text())
    result = here.run(*line.split(), *SHORT)
    assert result.returncode == 0, result
    (sweep,) = (here.folder / "outputs/sweeps").iterdir()
    assert [status(sweep / name)["state"] for name in "01"] == ["finished", "finished"]
    temperatures = [OmegaConf.load(sweep / name / "config.yaml").loss.teacher_temp for name in "01"]
    assert temperatures == [0.04, 0.07]


def test_a_point_that_is_stopped_comes_back_and_ends_as_if_it_had_not_been(
    here: WorkingCopy, slurm: dict[str, str]
) -> None:
    process = here.start("train.py", *ON_SLURM, "trainer.epochs=20", "seed=0,1")
    first = here.folder / "s" / "0"
    until(lambda: step(first) >= 5)
    (job,) = [name for name in squeue(slurm, "%i") if name.endswith("_0")]
    subprocess.run(["scancel", "--signal=USR2", job], env=slurm, check=True)
    until(lambda: "preempted" in (first / "train.log").read_text())
    result = finish(process)
    assert result.returncode == 0, result
    assert "SIGUSR2" in (first / "train.log").read_text()
    until(lambda: last_word(slurm, job) == "COMPLETED")
    whole = here.run("train.py", *SHORT, "trainer.epochs=20", "seed=0", "run_dir=whole")
    assert whole.returncode == 0, whole
    assert_same_run(first, here.folder / "whole")
    assert len(metrics(here.folder / "s" / "1")) > 0


def test_the_budget_of_requeues(here: WorkingCopy, slurm: dict[str, str]) -> None:
    process = here.start("train.py", *ON_SLURM, "trainer.epochs=300", "cluster.max_num_requeues=0", "seed=0,1")
    until(lambda: all(step(here.folder / "s" / number) >= 3 for number in "01"))
    for job in squeue(slurm, "%i"):
        subprocess.run(["scancel", "--signal=USR2", job], env=slurm, check=True)
    result = finish(process, timeout=90)
    assert result.returncode == 1, result
    assert result.stderr.count("not requeued: 0 requeues used up (cluster.max_num_requeues=0)") == 2


def test_two_ranks_a_point(here: WorkingCopy, slurm: dict[str, str]) -> None:
    result = here.run("train.py", *ON_SLURM, "cluster.nodes=2", "seed=0")
    assert result.returncode == 0, result
    log = (here.folder / "s" / "0" / "train.log").read_text()
    assert "images a step (32 x 1 on each of 2 ranks)" in log


def test_what_the_site_refuses(here: WorkingCopy) -> None:
    result = here.run("train.py", *ON_SLURM, "cluster.partition=gpuu", "seed=0,1")
    assert result.returncode == 2, result
    assert "cluster.partition=gpuu: sbatch says " in result.stderr
    assert "Traceback" not in result.stderr
