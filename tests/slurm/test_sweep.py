"""Whole sweeps on a real Slurm of two nodes, from `sweep.py submit` to `sweep.py collect`, whatever happens between."""

import subprocess
import time
from pathlib import Path

import pytest
from browser import browse
from command_line import REPOSITORY, TINY, assert_same_run, finish, metrics, start_ranks, train, wait_until
from sweep_command import SHORT, WorkingCopy, kill, squeue, step_of, table, until

from dino.sweep.attempts import Start, read_attempts
from dino.sweep.manifest import Manifest, Trial

ON_SLURM = ["cluster=slurm", "cluster.cpus_per_task=2", *SHORT]  # of the 4 that each node claims: 4 trials at once
LONG = ["trainer.epochs=100", "trainer.max_steps=600", "evaluation.knn.every_epochs=100", "schedule.lr.warmup_epochs=5"]


def on_slurm(slurm: dict[str, str], *words: str) -> None:
    done = subprocess.run(words, env=slurm, capture_output=True, text=True)
    assert done.returncode == 0, done


def starts(manifest: Manifest, trial: Trial) -> list[Start]:
    return [attempt for attempt in read_attempts(manifest.directory(trial)) if isinstance(attempt, Start)]


def job_of(manifest: Manifest, trial: Trial) -> str:
    job = starts(manifest, trial)[-1].job
    assert job is not None
    return job


def uninterrupted(manifest: Manifest, trial: Trial, folder: Path) -> Path:
    """The same trial as a plain run of train.py."""
    folder.mkdir(exist_ok=True)
    config = manifest.directory(trial) / "config.yaml"
    code = manifest.folder / manifest.snapshots[0].folder
    whole = WorkingCopy(folder, {"PYTHONPATH": f"{code / 'src'}:{REPOSITORY / 'tests'}"})
    result = whole.run(str(code / "train.py"), "--frozen", str(config), f"run_dir={folder / 'whole'}")
    assert result.returncode == 0, result
    return folder / "whole"


def test_nine_trials_from_submission_to_the_page(here: WorkingCopy, slurm: dict[str, str]) -> None:
    started = time.monotonic()
    manifest = here.submit(*ON_SLURM, "loss.teacher_temp=0.02,0.03,0.04", "ema.momentum=0.99,0.996,0.999")
    assert time.monotonic() - started < 10
    assert len(squeue(slurm, "%i")) == 9
    shown = here.sweep("status", str(manifest.folder), COLUMNS="200").stdout
    assert all(trial.id in shown for trial in manifest.trials)
    assert set(here.wait(manifest).values()) == {"finished"}
    assert here.run("sweep.py", "collect", "s").returncode == 0
    lines = table(manifest)
    assert len(lines) == 9
    for line, trial in zip(lines, manifest.trials, strict=True):
        logged = [point["val/knn_top1"] for point in metrics(manifest.directory(trial)) if "val/knn_top1" in point]
        assert float(line["val/knn_top1"]) == logged[-1]
    page = browse(manifest.folder / "sweep.html")
    assert page.console == []
    assert {"over_axes", "parallel_coordinates"} <= set(page.figures)
    assert all(trial.id in page.text for trial in manifest.trials)


def test_each_failure_has_its_class_and_disturbs_no_other(here: WorkingCopy, slurm: dict[str, str]) -> None:
    kinds = {"nothing": "finished", "fine": "finished", "raises": "failed", "is_killed": "killed"}
    kinds |= {"has_no_memory": "out of memory", "is_nan": "NaN"}
    manifest = here.submit(
        *ON_SLURM,
        "allowed_targets=[misbehaving]",
        "loss._target_=misbehaving.Misbehaving",
        "trainer.max_skipped_steps=0",
        f"+loss.how={','.join(kinds)}",
    )
    assert list(here.wait(manifest).values()) == list(kinds.values())
    found = here.statuses(manifest)
    raised = next(trial for trial in manifest.trials if trial.settings["loss.how"] == "raises")
    assert "mine/misbehaving.py:27: RuntimeError: prototypes went missing" in found[raised.id]["traceback"]
    collected = here.run("sweep.py", "collect", "s")
    assert collected.returncode == 1
    lines = {line["loss.how"]: line for line in table(manifest)}
    assert float(lines["fine"]["val/knn_top1"]) == float(lines["nothing"]["val/knn_top1"])
    listed = ["squeue", "-h", "-r", "-t", "all", "-o", "%i %T"]
    said = dict(line.split() for line in subprocess.check_output(listed, env=slurm, text=True).splitlines())
    for trial in manifest.trials:  # Slurm is told the truth as well
        expected = "COMPLETED" if kinds[trial.settings["loss.how"]] == "finished" else "FAILED"
        assert said[job_of(manifest, trial)] == expected, trial

    module = here.folder / "mine" / "misbehaving.py"
    module.write_text(module.read_text().replace("if self.count == 5:", "if False:"))
    here.sweep("resume", "s", "--code", "current")
    assert set(here.wait(manifest).values()) == {"finished"}
    assert here.run("sweep.py", "collect", "s").returncode == 0
    for trial in manifest.trials:
        assert len(starts(manifest, trial)) == (1 if kinds[trial.settings["loss.how"]] == "finished" else 2)


def test_a_time_limit_shorter_than_the_run_is_no_end_of_it(here: WorkingCopy, tmp_path: Path) -> None:
    """With the settings of conf/cluster/slurm.yaml but for the limit itself."""
    pace = ["trainer.max_steps=1500", "trainer.epochs=250", "evaluation.knn.every_epochs=250", "dataset.num_workers=4"]
    manifest = here.submit("cluster=slurm", "cluster.time_min=1", *SHORT, *pace, "trainer.save_every_steps=100000")
    (trial,) = manifest.trials
    assert here.wait(manifest, timeout=900) == {trial.id: "finished"}
    assert len(starts(manifest, trial)) > 1
    assert len({start.job for start in starts(manifest, trial)}) == 1
    assert_same_run(manifest.directory(trial), uninterrupted(manifest, trial, tmp_path / "other"))


def test_requeues_and_signals_with_workers_change_nothing(
    here: WorkingCopy, slurm: dict[str, str], tmp_path: Path
) -> None:
    """`scontrol requeue` and the signals of preemption; a limit of five minutes is not what stops the trial."""
    workers = "dataset.num_workers=4"
    manifest = here.submit(*ON_SLURM, *LONG, workers, "cluster.time_min=5", "cluster.tasks_per_node=1")
    (trial,) = manifest.trials
    stops = (["scancel", "--signal=USR2"], ["scontrol", "requeue"], ["scancel", "--signal=TERM"])
    for count, stop in enumerate(stops, start=1):
        until(lambda count=count: len(starts(manifest, trial)) == count)
        reached = max(0, step_of(manifest, trial))
        until(lambda reached=reached: step_of(manifest, trial) >= reached + 5)
        on_slurm(slurm, *stop, job_of(manifest, trial))
        until(lambda: here.states(manifest)[trial.id] == "preempted")
        assert here.statuses(manifest)[trial.id]["restarts"] == count - 1
    assert here.wait(manifest) == {trial.id: "finished"}
    assert [start.restart for start in starts(manifest, trial)] == [0, 1, 2, 3]
    assert_same_run(manifest.directory(trial), uninterrupted(manifest, trial, tmp_path / "other"))


def test_edits_after_submission_change_nothing(here: WorkingCopy, slurm: dict[str, str], tmp_path: Path) -> None:
    """One trial runs and is requeued, one waits; YAML and a module are changed meanwhile."""
    alone = ["cluster.max_parallel=1", *LONG]
    manifest = here.submit(*ON_SLURM, *alone, "loss.teacher_temp=0.02,0.03")
    first, second = manifest.trials
    until(lambda: step_of(manifest, first) >= 5)
    loss = here.folder / "src/dino/loss/dino_loss.py"
    loss.write_text("raise RuntimeError('edited')\n")
    recipe = here.folder / "conf/recipe/digits.yaml"
    edited = recipe.read_text().replace("koleo_weight: 0.2", "koleo_weight: 0.9")
    assert edited != recipe.read_text()
    recipe.write_text(edited)
    on_slurm(slurm, "scontrol", "requeue", job_of(manifest, first))
    states = WorkingCopy(
        here.folder, {**here.environment, "PYTHONPATH": f"{REPOSITORY / 'src'}:{here.folder / 'mine'}"}
    )
    assert set(states.wait(manifest).values()) == {"finished"}
    assert len(starts(manifest, first)) == 2
    for trial in (first, second):
        assert "koleo_weight: 0.2" in (manifest.directory(trial) / "config.yaml").read_text()
    folder = tmp_path / "other"
    folder.mkdir()
    expected = train(*SHORT, *LONG, "loss.teacher_temp=0.03", "run_dir=plain", cwd=folder)
    assert expected.returncode == 0, expected
    assert_same_run(manifest.directory(second), folder / "plain")
    assert_same_run(manifest.directory(first), uninterrupted(manifest, first, folder))


def test_a_trial_whose_node_goes_down_ends_finished(here: WorkingCopy, slurm: dict[str, str], tmp_path: Path) -> None:
    manifest = here.submit(*ON_SLURM, *LONG)
    (trial,) = manifest.trials
    until(lambda: step_of(manifest, trial) >= 20)
    node = starts(manifest, trial)[-1].host
    up = {**slurm, "SLURMLAB_DIR": str(Path(slurm["SLURM_CONF"]).parent), "SLURMLAB_ACCT": "0"}
    on_slurm(up, str(REPOSITORY / "tests/slurm/slurm-up.sh"), "kill-node", node)
    time.sleep(2)
    on_slurm(up, str(REPOSITORY / "tests/slurm/slurm-up.sh"), "start-node", node)
    assert here.wait(manifest) == {trial.id: "finished"}
    assert len(starts(manifest, trial)) == 2
    assert_same_run(manifest.directory(trial), uninterrupted(manifest, trial, tmp_path / "other"))


def test_two_nodes_are_one_trial_and_survive_a_requeue(
    here: WorkingCopy, slurm: dict[str, str], tmp_path: Path
) -> None:
    nodes = ["cluster.nodes=2", "cluster.tasks_per_node=1"]
    manifest = here.submit(*ON_SLURM, *LONG, *nodes, "dataset.batch_size=16", "backbone.drop_path_rate=0")
    (trial,) = manifest.trials
    until(lambda: step_of(manifest, trial) >= 20)
    on_slurm(slurm, "scontrol", "requeue", job_of(manifest, trial))
    assert here.wait(manifest) == {trial.id: "finished"}
    assert len(starts(manifest, trial)) == 2
    assert "2 ranks" in (manifest.directory(trial) / "train.log").read_text()
    folder = tmp_path / "other"
    folder.mkdir()
    both = [*SHORT, *LONG, "dataset.batch_size=16", "backbone.drop_path_rate=0"]
    by_hand = [finish(process) for process in start_ranks(2, *both, "run_dir=ranks", cwd=folder)]
    assert [result.returncode for result in by_hand] == [0, 0], by_hand
    assert_same_run(manifest.directory(trial), folder / "ranks")
    one = train(*both, "dataset.batch_size=32", "run_dir=one", cwd=folder)
    assert one.returncode == 0, one
    alone = [line["train/loss"] for line in metrics(folder / "one") if "train/loss" in line]
    apart = [line["train/loss"] for line in metrics(manifest.directory(trial)) if "train/loss" in line]
    assert apart[:20] == pytest.approx(alone[:20], rel=1e-4)  # in float32 they drift apart, slowly


@pytest.mark.parametrize("num_begun", [1, 3])
def test_a_submission_that_is_killed_is_completed_by_resume(
    here: WorkingCopy, slurm: dict[str, str], num_begun: int
) -> None:
    seeds = "sweep.seeds=[0,1,2,3,4,5]"
    process = here.start("sweep.py", "submit", "sweep.dir=s", *ON_SLURM, seeds, "cluster.array_limit=1")
    until(lambda: (here.folder / "s" / "manifest.json").exists())
    wait_until(lambda: len(Manifest.read(here.folder / "s").submissions) >= num_begun, process)
    kill(process)
    manifest = Manifest.read(here.folder / "s")
    assert len(manifest.trials) == 6
    assert len(manifest.submissions) < 6
    here.sweep("resume", "s")
    assert set(here.wait(manifest).values()) == {"finished"}
    assert [len(starts(manifest, trial)) for trial in manifest.trials] == [1] * 6


def test_sixty_trials_through_arrays_of_twenty_five(here: WorkingCopy, slurm: dict[str, str]) -> None:
    """One step each; this Slurm takes no larger arrays."""
    seeds = f"sweep.seeds=[{','.join(map(str, range(60)))}]"
    manifest = here.submit("cluster=slurm", *TINY, "trainer.max_steps=1", "evaluation=[]", seeds)
    assert sorted(len(submission.trials) for submission in manifest.submissions) == [10, 25, 25]
    assert set(here.wait(manifest, timeout=900).values()) == {"finished"}
    assert [len(starts(manifest, trial)) for trial in manifest.trials] == [1] * 60
    assert {line["seed"] for line in table(manifest)} == {str(seed) for seed in range(60)}


def test_a_poisoned_environment_changes_nothing(here: WorkingCopy, slurm: dict[str, str]) -> None:
    poison = {
        **{"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"},
        **{"SLURM_PROCID": "5", "SLURM_CPU_BIND": "none", "SLURM_MEM_PER_NODE": "1", "SBATCH_PARTITION": "nowhere"},
        **{"SBATCH_TIMELIMIT": "1", "SQUEUE_FORMAT": "%j", "SQUEUE_STATES": "CANCELLED", "PMI_RANK": "4"},
        **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"},
    }
    plain = here.submit(*ON_SLURM, name="plain")
    poisoned = here.submit(*ON_SLURM, name="poisoned", **poison)
    for manifest in (plain, poisoned):
        assert set(here.wait(manifest).values()) == {"finished"}
    assert_same_run(poisoned.directory(poisoned.trials[0]), plain.directory(plain.trials[0]))
    assert here.run("sweep.py", "status", "poisoned", **poison).returncode == 0
