"""The asynchronous search with a real study, controller and supervisors; what they start is a small program."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from command_line import TINY
from handmade_sweep import handmade_sweep
from local_sweep import details, end_all, kill_controller, lives, most_at_once, states, until
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from dino.messages import ConfigError
from dino.sweep import background
from dino.sweep.manifest import Manifest
from dino.sweep.plan import axes_of
from dino.sweep.pruning import Pruning
from dino.sweep.search import measured, open_study
from dino.sweep.space import space_of
from dino.sweep.study import Study

# Measures `value`, a function of `temp`, once an epoch, `epoch_s` apart, as a training does.
PROGRAM = """
import re, math

number = directory.name[:3]
begin = time.time()
temp = float(re.search(r"^  teacher_temp: (.*)$", (directory / "config.yaml").read_text(), re.MULTILINE)[1])
value, epochs, epoch_s = 1 - abs(temp - 0.05), 2, 0.0
when_asked(preempted)
status("running", 0)

def measure(epoch, value):
    with open(directory / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": epoch * 6, "epoch": float(epoch), "time": 0.0, "val/knn_top1": value}) + "\\n")
"""
TRAINS = """
for epoch in range(1, epochs + 1):
    time.sleep(epoch_s)
    measure(epoch, None if math.isnan(value) else value)
(directory / "lived").write_text(json.dumps([begin, time.time()]))
status("finished", 12)
"""
INTERVAL = "loss.teacher_temp=interval(0.02,0.09)"


@pytest.fixture(autouse=True)
def _nothing_stays(tmp_path: Path) -> Iterator[None]:
    yield
    end_all(tmp_path / "s")


def sweep_of(folder: Path, special: str = "", *, slots: int = 2, **sweep: Any) -> Manifest:
    """`special`: lines between the beginning of the program and its training."""
    settings = {
        "axes": [INTERVAL],
        "seeds": [0],
        "search": "optuna",
        "num_trials": 6,
        "search_seed": 0,
        "max_parallel": None,
        "metric": "val/knn_top1",
        "direction": "maximize",
        "on_failure": "continue",
        "pruning": {"pruner": None},
    }
    cluster = {"_target_": "dino.sweep.local.LocalCluster", "devices": [], "trials_on_cpu": slots}
    manifest = handmade_sweep(folder, PROGRAM + special + TRAINS, 0, sweep=settings | sweep, cluster=cluster)
    manifest.base = list(TINY)
    manifest.write()
    return manifest


def begin(manifest: Manifest) -> None:
    with manifest.locked():
        background.ensure_running(manifest)


def wait_for_end(manifest: Manifest) -> None:
    until(lambda: not background.is_running(manifest))
    log = (manifest.folder / background.LOG).read_text()
    assert "Traceback" not in log, log


def proposals(manifest: Manifest) -> list[FrozenTrial]:
    """As any reader of Optuna's file sees them."""
    backend = optuna.storages.journal.JournalFileBackend(str(manifest.folder / "study.log"))
    return optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend)).trials


def begun(manifest: Manifest) -> list[int]:
    """How often each trial was begun."""
    trials = Manifest.read(manifest.folder).trials
    return [len((manifest.directory(trial) / "begun_0").read_text().splitlines()) for trial in trials]


# ---------------------------------------------------------------------- axes


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a=1,2,null", CategoricalDistribution(["1", "2", "null"])),
        ("backbone=vit_s16,vit_t16", CategoricalDistribution(["vit_s16", "vit_t16"])),
        ("a='x y',[1,2]", CategoricalDistribution(["'x y'", "[1,2]"])),
        ("a=shuffle(3,1,2)", CategoricalDistribution(["3", "1", "2"])),
        ("a=shuffle(range(0,3))", CategoricalDistribution(["0", "1", "2"])),
        ("a=7", CategoricalDistribution(["7"])),
        ("a=range(0,10,2)", IntDistribution(0, 10, step=2)),
        ("a=range(0,1,0.25)", FloatDistribution(0, 1, step=0.25)),
        ("a=interval(0.02,0.07)", FloatDistribution(0.02, 0.07)),
        ("a=interval(1,8)", FloatDistribution(1, 8)),
        ("a=int(interval(1,8))", IntDistribution(1, 8)),
        ("a=tag(log,interval(1e-4,1e-1))", FloatDistribution(1e-4, 1e-1, log=True)),
        ("a=tag(log,int(interval(1,100)))", IntDistribution(1, 100, log=True)),
    ],
)
def test_axes_mean_what_they_mean_to_the_optuna_sweeper_of_hydra(line: str, expected: BaseDistribution) -> None:
    (found,) = space_of(axes_of([line])).values()
    assert found == expected


def test_all_axes_that_have_no_values_are_named() -> None:
    with pytest.raises(ConfigError) as refused:
        space_of(axes_of(["a=range(2.0,1.0)", "b=range(5,1)", "c=1,2"]))
    assert len(refused.value.problems) == 2
    assert refused.value.problems[0].startswith("a=range(2.0,1.0): ")


# ---------------------------------------------------------------------- the study


def open_one(folder: Path, line: str = INTERVAL, **pruning: Any) -> Study:
    space = space_of(axes_of([line]))
    return Study(folder, space, direction="maximize", seed=3, pruning=Pruning(**pruning))


def test_proposals_do_not_depend_on_who_asks(tmp_path: Path) -> None:
    """A study that is opened anew for each of them proposes the same as one that stays open."""
    for name in ("whole", "pieces"):
        (tmp_path / name).mkdir()
    whole = open_one(tmp_path / "whole")
    expected, actual = [], []
    for value in range(15):
        number = whole.ask()
        expected += whole.assignments(number)
        whole.tell(number, float(value))
        number = open_one(tmp_path / "pieces").ask()
        actual += open_one(tmp_path / "pieces").assignments(number)
        open_one(tmp_path / "pieces").tell(number, float(value))
    assert actual == expected
    assert len(set(actual)) == 15


def test_the_search_comes_nearer_to_the_best(tmp_path: Path) -> None:
    study = open_one(tmp_path, "x=interval(-10,10)")
    tried = []
    for _ in range(40):
        number = study.ask()
        tried.append(float(study.assignments(number)[0].removeprefix("x=")))
        study.tell(number, -((tried[-1] - 2) ** 2))
    early, late = (sum(abs(x - 2) for x in part) / len(part) for part in (tried[:10], tried[-10:]))
    assert late < early / 2


def test_the_median_ends_what_is_worse_and_not_before_it_may(tmp_path: Path) -> None:
    study = open_one(tmp_path, pruner="median", startup_trials=2, warmup_epochs=2)
    for value in (0.5, 0.6):
        number = study.ask()
        assert not any(study.report(number, epoch, value) for epoch in (1, 2, 3))
        study.tell(number, value)
    bad, good = study.ask(), study.ask()
    assert not study.report(bad, 1, 0.1)  # warming up
    assert study.report(bad, 2, 0.1)
    assert not study.report(bad, 2, 0.1)  # this was said before
    assert not study.report(good, 2, 0.7)


def test_asha_keeps_the_best_quarter(tmp_path: Path) -> None:
    study = open_one(tmp_path, pruner="asha", warmup_epochs=1)
    ended = []
    for value in (0.9, 0.8, 0.1, 0.2, 0.95):
        number = study.ask()
        ended.append(study.report(number, 1, value))
    assert ended[-1] is False
    assert ended[2] is ended[3] is True


def test_a_line_that_was_cut_off_is_no_harm(tmp_path: Path) -> None:
    open_one(tmp_path).ask()
    with (tmp_path / "study.log").open("a") as file:
        file.write('{"op_code":')
    study = open_one(tmp_path)
    assert study.under_way() == [0]
    study.tell(0, 1.0)
    assert open_one(tmp_path).under_way() == []


def test_values_that_are_not_finite_are_failures(tmp_path: Path) -> None:
    study = open_one(tmp_path)
    number = study.ask()
    study.tell(number, float("nan"))
    assert study.under_way() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pruner": "mean"}, "sweep.pruning.pruner=mean: use median or asha"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1"),
    ],
)
def test_pruning_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pruning(**settings)


def test_what_was_measured_is_read_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert list(measured(path, "val/knn_top1")) == []
    lines = [
        {"epoch": 0.5, "train/loss": 2.0},
        {"epoch": 1.0, "val/knn_top1": 0.25},
        {"epoch": 2.0, "val/knn_top1": None},
        {"epoch": 3.0, "val/knn_top1": 0.5},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"epoch": 4.0, "val/knn_top1": 0.')
    assert list(measured(path, "val/knn_top1")) == [(1, 0.25), (3, 0.5)]


def test_without_optuna_the_way_to_it_is_said(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['optuna'] = None\n"
        "import dino.sweep.controller\n"
        "from dino.sweep.search import open_study\n"
        f"open_study({str(tmp_path)!r}, {{}})"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "ValueError: sweep.search=optuna: " in result.stderr
    assert "pip install optuna" in result.stderr


# ---------------------------------------------------------------------- searches, whole


def test_a_new_trial_begins_while_a_slow_one_still_runs(tmp_path: Path) -> None:
    slow = 'while number == "000" and not (directory.parent / "go").exists(): time.sleep(0.01)\n'
    manifest = sweep_of(tmp_path / "s", slow)
    begin(manifest)
    until(lambda: states(manifest).count("finished") == 5)
    assert states(manifest)[0] == "running"
    (manifest.folder / "go").touch()
    wait_for_end(manifest)
    assert states(manifest) == ["finished"] * 6
    told = {proposal.user_attrs["trial"]: proposal.value for proposal in proposals(manifest)}
    assert told == {state.trial.id: state.metrics["val/knn_top1"] for state in details(manifest)}
    assert most_at_once(lives(manifest)) == 2


def test_what_fails_is_no_value_and_ends_nothing(tmp_path: Path) -> None:
    special = 'if number == "001": sys.exit(1)\nif number == "002": value = math.nan\n'
    special += 'if number == "003": os.kill(os.getpid(), signal.SIGKILL)\n'
    manifest = sweep_of(tmp_path / "s", special)
    begin(manifest)
    wait_for_end(manifest)
    assert states(manifest) == ["finished", "failed", "finished", "killed", "finished", "finished"]
    ends = {proposal.user_attrs["trial"][:3]: proposal.state for proposal in proposals(manifest)}
    failed = {number for number, state in ends.items() if state == TrialState.FAIL}
    assert failed == {"001", "002", "003"}
    assert all(ends[number] == TrialState.COMPLETE for number in ends.keys() - failed)


def test_on_failure_stop_ends_the_search(tmp_path: Path) -> None:
    manifest = sweep_of(tmp_path / "s", 'if number == "001": sys.exit(1)\n', slots=1, on_failure="stop")
    begin(manifest)
    wait_for_end(manifest)
    assert states(manifest) == ["finished", "failed"]


def test_points_that_cannot_be_are_passed_over(tmp_path: Path) -> None:
    axes = ["backbone.num_heads=2,5", "loss.teacher_temp=0.04,0.05,0.06"]  # 5 heads do not share 32 features
    manifest = sweep_of(tmp_path / "s", axes=axes)
    begin(manifest)
    wait_for_end(manifest)
    assert set(states(manifest)) == {"finished"}
    refused = [proposal for proposal in proposals(manifest) if "trial" not in proposal.user_attrs]
    assert len(refused) + len(states(manifest)) == 6
    assert all(proposal.state == TrialState.FAIL for proposal in refused)
    assert all("num_heads" in proposal.user_attrs["reason"] for proposal in refused)


def test_a_point_that_is_known_is_not_run_again_but_told(tmp_path: Path) -> None:
    manifest = sweep_of(tmp_path / "s", axes=["loss.teacher_temp=0.04,0.07", "trainer.num_threads=1,2"])
    begin(manifest)
    wait_for_end(manifest)
    # Four points, but the number of threads does not change results.
    assert states(manifest) == ["finished"] * 2
    assert begun(manifest) == [1, 1]
    values = {state.trial.id: state.metrics["val/knn_top1"] for state in details(manifest)}
    told = proposals(manifest)
    assert len(told) > 2
    assert all(proposal.value == values[proposal.user_attrs["trial"]] for proposal in told)


@pytest.mark.slow
def test_a_trial_that_falls_behind_is_pruned(tmp_path: Path) -> None:
    special = 'if number == "003": value, epochs, epoch_s = 0.1, 200, 0.2\n'
    pruning = {"pruner": "median", "startup_trials": 2, "warmup_epochs": 2}
    manifest = sweep_of(tmp_path / "s", special, slots=1, num_trials=5, pruning=pruning)
    begin(manifest)
    wait_for_end(manifest)
    assert states(manifest) == ["finished"] * 3 + ["pruned", "finished"]
    assert (details(manifest)[3].reason or "").startswith("pruned at epoch 2: val/knn_top1=0.1 ")
    told = proposals(manifest)
    assert [proposal.state == TrialState.PRUNED for proposal in told] == [False] * 3 + [True, False]
    assert all(len(proposal.intermediate_values) == 2 for proposal in told[:3])
    begin(manifest)  # is left alone
    wait_for_end(manifest)
    assert begun(manifest) == [1] * 5


@pytest.mark.slow
def test_a_controller_that_is_killed_leaves_nothing_lost_or_doubled(tmp_path: Path) -> None:
    """Killed in the middle of two trials, and again at whatever it does in its first second."""
    special = 'while not (directory.parent / "go").exists(): time.sleep(0.01)\n'
    manifest = sweep_of(tmp_path / "s", special, num_trials=8)
    begin(manifest)
    until(lambda: states(manifest) == ["running"] * 2)
    kill_controller(manifest)
    begin(manifest)
    time.sleep(1)
    assert len(Manifest.read(manifest.folder).submissions) == 2  # what runs is not handed over again
    kill_controller(manifest)
    (manifest.folder / "go").touch()
    for moment in (0.0, 0.1, 0.2, 0.35, 0.5, 0.8):
        begin(manifest)
        time.sleep(moment)
        kill_controller(manifest)
    begin(manifest)
    wait_for_end(manifest)
    assert states(manifest) == ["finished"] * 8
    assert begun(manifest) == [1] * 8
    told = proposals(manifest)
    assert [proposal.state for proposal in told] == [TrialState.COMPLETE] * 8
    assert sorted(proposal.user_attrs["trial"] for proposal in told) == [state.trial.id for state in details(manifest)]


def test_what_was_interrupted_goes_on_when_the_search_is_resumed(tmp_path: Path) -> None:
    special = 'while attempt == 1 and number == "001": time.sleep(0.01)\n'
    manifest = sweep_of(tmp_path / "s", special, num_trials=3)
    begin(manifest)
    until(lambda: states(manifest) == ["finished", "running", "finished"])
    kill_controller(manifest)
    supervisor = json.loads((details(manifest)[1].directory / "attempts.jsonl").read_text().splitlines()[0])["pid"]
    os.killpg(supervisor, signal.SIGKILL)  # as when the machine goes down
    until(lambda: states(manifest)[1] == "killed")
    begin(manifest)
    wait_for_end(manifest)
    assert states(manifest) == ["finished"] * 3
    assert begun(manifest) == [1, 2, 1]
    assert [proposal.state for proposal in proposals(manifest)] == [TrialState.COMPLETE] * 3


def test_a_trial_that_was_half_frozen_is_frozen_again(tmp_path: Path) -> None:
    manifest = sweep_of(tmp_path / "s", num_trials=1)
    begin(manifest)
    wait_for_end(manifest)
    (trial,) = Manifest.read(manifest.folder).trials
    again = sweep_of(tmp_path / "again", num_trials=1)
    (again.folder / trial.id).mkdir()  # there a controller was killed
    begin(again)
    wait_for_end(again)
    assert states(again) == ["finished"]


def test_a_search_that_is_stopped_begins_nothing_more(tmp_path: Path) -> None:
    special = 'while not (directory.parent / "go").exists(): time.sleep(0.01)\n'
    manifest = sweep_of(tmp_path / "s", special)
    begin(manifest)
    until(lambda: states(manifest) == ["running"] * 2)
    background.stop(manifest)
    (manifest.folder / "go").touch()
    until(lambda: states(manifest) == ["finished"] * 2)
    assert not background.is_running(manifest)


def test_open_study_says_which_axis_cannot_be_searched(tmp_path: Path) -> None:
    settings = {"axes": ["a=tag(log,interval(1,0.5))"], "direction": "maximize", "search_seed": 0}
    with pytest.raises(ValueError, match=r"a=tag\(log,interval\(1,0.5\)\): "):
        open_study(tmp_path, settings)
