"""Every command of sweep.py on this machine, as a person types them."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import assert_same_run
from sweep_command import SHORT, WorkingCopy, step_of, table, until

from dino.sweep import background
from dino.sweep.attempts import End, Start, read_attempts
from dino.sweep.job import LOCK
from dino.sweep.locks import holder_of
from dino.sweep.manifest import Manifest

HERE = ["cluster.trials_on_cpu=2", *SHORT]
LONG = ["trainer.epochs=100", "trainer.max_steps=600", "evaluation.knn.every_epochs=100", "schedule.lr.warmup_epochs=5"]
MINE = ["allowed_targets=[misbehaving]", "loss._target_=misbehaving.Misbehaving"]


@pytest.fixture
def here(tmp_path: Path) -> Iterator[WorkingCopy]:
    copy = WorkingCopy.make(tmp_path / "copy")
    yield copy
    for path in tmp_path.rglob("manifest.json"):  # what a test has left running
        manifest = Manifest.read(path.parent)
        background.stop(manifest)
        for trial in manifest.trials:
            supervisor = holder_of(manifest.directory(trial) / LOCK)
            if supervisor is not None:
                os.kill(supervisor, signal.SIGKILL)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> WorkingCopy:
    """With a sweep `s` of two trials, of which nothing is submitted."""
    copy = WorkingCopy.make(tmp_path_factory.mktemp("planned") / "copy")
    copy.sweep("submit", "--dry-run", "sweep.dir=s", "sweep.seeds=[0,1]", *HERE)
    return copy


def num_starts(manifest: Manifest) -> list[int]:
    return [
        sum(isinstance(attempt, Start) for attempt in read_attempts(manifest.directory(trial)))
        for trial in manifest.trials
    ]


def test_from_submission_to_collection(here: WorkingCopy) -> None:
    """With no folder named, every command takes the newest sweep."""
    began = time.monotonic()
    here.sweep("submit", *HERE, "loss.teacher_temp=0.02,0.03", "sweep.seeds=[0,1]")
    assert time.monotonic() - began < 30
    assert here.run("sweep.py", "collect").returncode == 75
    watched = here.sweep("status", "--watch").stdout
    assert "4 finished" in watched
    (folder,) = (here.folder / "outputs/sweeps").iterdir()
    manifest = Manifest.read(folder)
    shown = here.sweep("status", COLUMNS="80").stdout
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert all(f"{trial.id} " in shown for trial in manifest.trials)
    assert shown.count("12/12") == shown.count("finished") - 1 == 4
    collected = here.run("sweep.py", "collect", COLUMNS="80")
    assert collected.returncode == 0, collected
    best = json.loads((folder / "results.json").read_text())["best"]["command"]
    assert best in collected.stdout.splitlines()  # in one line, to be pasted
    assert [line["state"] for line in table(manifest)] == ["finished"] * 4
    said = here.sweep("logs", str(folder), "2", "-n", "1").stdout.splitlines()
    assert re.search(r"002_\w+/train.log$", said[0])
    assert len(said) == 2
    assert "left alone  4 finished, 0 under way" in here.sweep("resume").stdout
    assert num_starts(manifest) == [1] * 4


@pytest.mark.slow
def test_cancelled_trials_go_on_when_resumed(here: WorkingCopy, tmp_path: Path) -> None:
    """Also from another place, after the sweep has been moved there."""
    manifest = here.submit(*HERE, *LONG, "sweep.seeds=[0,1,2]")
    running, waiting = manifest.trials[0], manifest.trials[2]
    until(lambda: step_of(manifest, running) >= 10)
    assert "cancelled   2 trials" in here.sweep("cancel", "s", "0", waiting.id).stdout
    until(lambda: here.states(manifest)[running.id] == "cancelled")
    assert here.states(manifest)[waiting.id] == "cancelled"
    assert here.wait(manifest) == dict(
        zip((trial.id for trial in manifest.trials), ["cancelled", "finished", "cancelled"], strict=True)
    )
    assert here.run("sweep.py", "collect", "s").returncode == 1
    until(lambda: not background.is_running(manifest))
    shutil.move(here.folder / "s", tmp_path / "moved")
    moved = Manifest.read(tmp_path / "moved")
    assert "submitted   2 trials with the code in code:" in here.sweep("resume", str(moved.folder)).stdout
    assert set(here.wait(moved).values()) == {"finished"}
    assert num_starts(moved) == [2, 1, 1]
    assert not (here.folder / "s").exists()
    code, config = moved.folder / "code", moved.directory(running) / "config.yaml"
    path = {"PYTHONPATH": f"{code / 'src'}"}
    whole = here.run(str(code / "train.py"), "--frozen", str(config), f"run_dir={tmp_path / 'whole'}", **path)
    assert whole.returncode == 0, whole
    assert_same_run(moved.directory(running), tmp_path / "whole")


@pytest.mark.slow
def test_what_failed_runs_the_mended_code_and_nothing_else_does(here: WorkingCopy) -> None:
    """The loss is part of the copied code; one trial raises in it, one is killed."""
    (here.folder / "src/dino/misbehaving.py").write_text((here.folder / "mine/misbehaving.py").read_text())
    kinds = ["fine", "raises", "is_killed"]
    words = ["loss._target_=dino.misbehaving.Misbehaving", f"+loss.how={','.join(kinds)}"]
    manifest = here.submit(*HERE, *words)
    assert list(here.wait(manifest).values()) == ["finished", "failed", "killed"]
    assert "src/dino/misbehaving.py:27: RuntimeError" in here.sweep("status", "s", COLUMNS="300").stdout
    module = here.folder / "src/dino/misbehaving.py"
    module.write_text(module.read_text().replace("if self.count == 5:", "if False:"))
    here.sweep("resume", "s")
    assert list(here.wait(manifest).values()) == ["finished", "finished", "killed"]  # the old code kills it again
    manifest = Manifest.read(manifest.folder)
    assert [snapshot.folder for snapshot in manifest.snapshots] == ["code", "code_2"]
    here.sweep("resume", "s", "--code", "current")
    assert set(here.wait(manifest).values()) == {"finished"}
    assert num_starts(manifest) == [1, 2, 3]


@pytest.mark.slow
def test_a_later_end_is_not_taken_for_an_earlier_one(here: WorkingCopy) -> None:
    """It raises, then it is killed: neither the class nor the reason of before is left."""
    manifest = here.submit(*HERE, *MINE, "+loss.how=raises")
    (trial,) = manifest.trials
    assert here.wait(manifest) == {trial.id: "failed"}
    module = here.folder / "mine/misbehaving.py"
    module.write_text(module.read_text().replace("raise RuntimeError(", "os.kill(os.getpid(), 9) #"))
    here.sweep("resume", "s")
    assert here.wait(manifest) == {trial.id: "killed"}
    told = here.statuses(manifest)[trial.id]
    assert told["reason"] == "SIGKILL ended rank 0"
    assert told["traceback"] is None


@pytest.mark.slow
def test_a_trial_that_fails_can_be_tried_again_or_stop_the_others(here: WorkingCopy) -> None:
    again = here.submit(*HERE, *MINE, "+loss.how=raises", "sweep.on_failure=retry:2", name="again")
    assert set(here.wait(again).values()) == {"failed"}
    assert num_starts(again) == [3]
    stop = ["+loss.how=raises,fine", *LONG, "sweep.on_failure=stop", "sweep.seeds=[0,1]"]
    stopped = here.submit(*HERE, *MINE, *stop, name="stopped")
    states = list(here.wait(stopped).values())
    assert "failed" in states
    assert set(states[2:]) == {"cancelled"}
    ends = [attempt for attempt in read_attempts(stopped.directory(stopped.trials[3])) if isinstance(attempt, End)]
    assert ends == []  # it never began


@pytest.mark.slow
def test_a_dry_run_freezes_and_shows_and_submits_nothing(here: WorkingCopy) -> None:
    result = here.sweep("submit", "--dry-run", "sweep.dir=s", *HERE, "sweep.seeds=[0,1]")
    manifest = Manifest.read(here.folder / "s")
    shown = [line for line in result.stdout.splitlines() if "dino.sweep.job" in line]
    assert [trial.id in line for trial, line in zip(manifest.trials, shown, strict=True)] == [True, True]
    assert set(here.states(manifest).values()) == {"pending"}
    assert here.run("sweep.py", "collect", "s").returncode == 1
    assert not background.is_running(manifest)
    here.sweep("resume", "s")
    assert set(here.wait(manifest).values()) == {"finished"}


@pytest.mark.slow
def test_without_a_name_the_newest_sweep_is_one_that_was_submitted(here: WorkingCopy) -> None:
    real = here.submit(*HERE, *LONG, name="outputs/sweeps/real")
    here.sweep("submit", "--dry-run", "sweep.dir=outputs/sweeps/dry", *HERE)
    assert "cancelled   1 trial of outputs/sweeps/real; those that run" in here.sweep("cancel").stdout
    assert set(here.wait(real).values()) == {"cancelled"}


@pytest.mark.slow
def test_two_who_resume_at_once_start_nothing_twice(here: WorkingCopy) -> None:
    manifest = here.submit("--dry-run", *HERE, "sweep.seeds=[0,1,2]")
    both = [here.start("sweep.py", "resume", "s") for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert set(here.wait(manifest).values()) == {"finished"}
    assert num_starts(manifest) == [1] * 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["status", "nowhere"], "no sweep is here (manifest.json is missing)"),
        (["status"], "outputs/sweeps: no sweep is here; name the folder of one, or submit one"),
        (["submit", "seed=1"], "write sweep.seeds=[1]"),
        (["submit", "backbone=glob(vit*)"], "write the options themselves"),
        (["submit", "sweep.dir=/proc/x"], "sweep.dir=/proc/x: this folder cannot be made"),
        (["submit", "sweep.name=a/b"], "sweep.name=a/b: use a word without a slash"),
        (["submit", "sweep.search=optuna", "sweep.num_trials=2"], "a search needs something to vary"),
        (
            ["submit", "sweep.search=optuna", "sweep.num_trials=2", "loss.teacher_tmp=interval(0.1,1)"],
            "did you mean loss.teacher_temp?",
        ),
        (
            ["submit", "sweep.search=optuna", "sweep.num_trials=2", "loss.teacher_temp=interval(-1,1)"],
            "loss.teacher_temp=-1.0: use a number above 0",
        ),
        (["submit", "optimizer.lr=1,2", "optimizer.lr=3"], "optimizer.lr: given twice"),
        (["logs", "s", "99"], "99: no such trial in"),
        (["cancel", "s", "third"], "third: no such trial in"),
        (["resume", "s", "000_00000000"], "000_00000000: no such trial in"),
        (["logs", "s", "-f"], "--follow: name one trial"),
        (["resume", "s", "--code", "old"], "'old' is not one of"),
        (["submit", "sweep.dir=s"], "a sweep is there already; sweep.py resume goes on with it"),
        (["submit", "cluster=slurm"], "cluster=slurm: sbatch is not on this machine"),
        (["submit", "cluster=debug", "sweep.search=optuna", "sweep.num_trials=2"], "use cluster=local"),
        (["submit", "sweep.search=optuna", "sweep.num_trials=2", "optimizer.lr=interval(1"], "cannot be read"),
        (["submit", "cluster.trials_per_device=0"], "cluster.trials_per_device=0: use a whole number of at least 1"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(words: list[str], said: str, planned: WorkingCopy) -> None:
    result = planned.run("sweep.py", *words, PATH="/nowhere")
    assert result.returncode == 2, result
    assert said in " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())
    assert "Traceback" not in result.stderr


def test_a_damaged_file_of_one_trial_hides_no_other(planned: WorkingCopy) -> None:
    manifest = Manifest.read(planned.folder / "s")
    directory = manifest.directory(manifest.trials[0])
    for name in ("attempts.jsonl", "metrics.jsonl", "status.json", "training_summary.json"):
        (directory / name).write_bytes(b'[]\n{}\n\xff\xfe\x00 no text\n{"step": 3, "val/knn_to')
    shown = planned.run("sweep.py", "status", "s")
    assert shown.returncode == 0, shown
    assert manifest.trials[1].id in shown.stdout
    (directory / "training_summary.json").write_text("[]")
    (directory / "status.json").write_text("[]")
    collected = planned.run("sweep.py", "collect", "s")
    assert collected.returncode == 1, collected
    assert "Traceback" not in collected.stderr


@pytest.mark.slow
def test_a_search_from_submission_to_collection(here: WorkingCopy) -> None:
    """Watching lasts as long as it chooses trials; cancelled, it goes on when it is resumed."""
    axes = ["optimizer.lr=tag(log,interval(0.01,0.1))", "loss.teacher_temp=0.02,0.03"]
    manifest = here.submit(*HERE, "sweep.search=optuna", "sweep.num_trials=4", "sweep.max_parallel=2", *axes)
    assert here.run("sweep.py", "collect", "s").returncode == 75
    until(lambda: Manifest.read(manifest.folder).trials)
    until(lambda: step_of(manifest, Manifest.read(manifest.folder).trials[0]) >= 0)
    here.sweep("cancel", "s")
    until(lambda: here.run("sweep.py", "collect", "s").returncode != 75)
    begun = len(Manifest.read(manifest.folder).trials)
    assert 0 < begun < 4
    here.sweep("resume", "s")
    assert "4 finished" in here.sweep("status", "s", "--watch").stdout
    assert here.run("sweep.py", "collect", "s").returncode == 0
    chosen = [trial.settings for trial in Manifest.read(manifest.folder).trials]
    assert all(0.01 <= settings["optimizer.lr"] <= 0.1 for settings in chosen)
    assert len({settings["optimizer.lr"] for settings in chosen}) == 4


@pytest.mark.slow
def test_a_trial_that_collapses_is_called_that_and_left_alone(here: WorkingCopy) -> None:
    """Tried again it would collapse again."""
    collapsing = [
        *("loss.center_momentum=1", "loss.koleo_weight=0", "schedule.lr.warmup_epochs=0", "trainer.epochs=8"),
        *("trainer.freeze_last_layer_epochs=0", "monitor.health.patience_steps=10", "monitor.on_collapse=stop"),
    ]
    here.sweep("submit", "sweep.dir=s", *HERE, *collapsing, "sweep.on_failure=retry:3")
    shown = here.sweep("status", "s", "--watch").stdout
    assert "collapsed" in shown
    assert here.run("sweep.py", "collect", "s").returncode == 1
    manifest = Manifest.read(here.folder / "s")
    (line,) = table(manifest)
    assert (line["state"], line["exit_code"]) == ("collapsed", "4")
    assert "constant collapse" in line["reason"]
    here.sweep("resume", "s")
    assert num_starts(manifest) == [1]
