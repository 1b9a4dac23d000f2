"""The asynchronous search with trials that are Slurm jobs."""

from pathlib import Path

import optuna
import pytest
from command_line import TINY
from handmade_sweep import handmade_sweep
from local_sweep import details, kill_controller, states, until
from optuna.trial import TrialState

from dino.sweep import background
from dino.sweep.manifest import Manifest
from dino.sweep.study import STUDY

# The first trial is slow, the second fails, the third falls behind and has to be ended.
PROGRAM = """
number, begin = directory.name[:3], time.time()
when_asked(preempted)
status("running", 0)
if number == "001":
    sys.exit(1)
while number == "000" and not (directory.parent / "go").exists():
    time.sleep(0.1)
for epoch in range(1, 300 if number == "004" else 3):
    value = 0.1 if number == "004" else 0.9
    with open(directory / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": epoch, "epoch": float(epoch), "val/knn_top1": value}) + "\\n")
    time.sleep(0.2)
(directory / "lived").write_text(json.dumps([begin, time.time()]))
status("finished", 9)
"""


def test_a_search_goes_on_around_slow_failing_and_pruned_jobs_and_a_killed_controller(
    slurm: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm["SLURM_CONF"])
    sweep = {
        "axes": ["loss.teacher_temp=interval(0.02,0.09)"],
        "seeds": [0],
        "search": "optuna",
        "num_trials": 6,
        "search_seed": 0,
        "max_parallel": 2,
        "metric": "val/knn_top1",
        "direction": "maximize",
        "on_failure": "continue",
        "pruning": {"pruner": "median", "startup_trials": 2, "warmup_epochs": 1},
    }
    cluster = {"_target_": "dino.sweep.slurm.SlurmCluster", "time_min": 30}
    manifest = handmade_sweep(tmp_path / "s", PROGRAM, 0, sweep=sweep, cluster=cluster)
    manifest.base = list(TINY)
    manifest.write()
    begin(manifest)
    until(lambda: states(manifest)[:2] == ["running", "failed"], timeout=120)
    kill_controller(manifest)
    begin(manifest)
    until(lambda: states(manifest)[0] == "running" and states(manifest)[4:5] == ["pruned"], timeout=240)
    (manifest.folder / "go").touch()
    until(lambda: not background.is_running(manifest), timeout=240)
    assert states(manifest) == ["finished", "failed", "finished", "finished", "pruned", "finished"]
    trials = Manifest.read(manifest.folder).trials
    assert [len((manifest.directory(trial) / "begun_0").read_text().splitlines()) for trial in trials] == [1] * 6
    backend = optuna.storages.journal.JournalFileBackend(str(manifest.folder / STUDY))
    study = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend))
    ends = {proposal.user_attrs["trial"][:3]: proposal.state for proposal in study.trials}
    assert ends == dict.fromkeys(("000", "002", "003", "005"), TrialState.COMPLETE) | {
        "001": TrialState.FAIL,
        "004": TrialState.PRUNED,
    }
    assert all(state.job for state in details(manifest))


def begin(manifest: Manifest) -> None:
    with manifest.locked():
        background.ensure_running(manifest)
