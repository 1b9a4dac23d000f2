"""The local pool with real supervisors and controllers; what they start is a small program in place of a training."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import REPOSITORY, TINY, assert_same_run, status
from handmade_sweep import FINISHES, WAITS, attempts, ends, environments, handmade_sweep, starts
from local_sweep import controller_of, details, end_all, kill_controller, lives, most_at_once, states, until

from dino.sweep import background
from dino.sweep.clusters import cluster_of
from dino.sweep.job import LOCK
from dino.sweep.local import LocalCluster, visible_devices
from dino.sweep.manifest import Manifest, Snapshot
from dino.sweep.pool import is_alive
from dino.sweep.snapshot import digest
from dino.sweep.states import trial_states

# Notes when it lives, and ends once the test lets it.
UNTIL_LET_GO = """
begin = time.time()
when_asked(preempted)
status("running", 1)
while not (directory.parent / "go").exists():
    time.sleep(0.01)
(directory / "lived").write_text(json.dumps([begin, time.time()]))
status("finished", 9)
"""
FOR_A_MOMENT = UNTIL_LET_GO.replace('while not (directory.parent / "go").exists():\n    ', "").replace("0.01", "0.4")


@pytest.fixture(autouse=True)
def _nothing_stays(tmp_path: Path) -> Iterator[None]:
    yield
    end_all(tmp_path / "s")


def sweep_of(folder: Path, program: str, count: int, **cluster: Any) -> Manifest:
    settings = {"_target_": "dino.sweep.local.LocalCluster", **cluster}
    return handmade_sweep(folder, program, count, cluster=settings, sweep={"search": "grid", "max_parallel": None})


def submit(manifest: Manifest, *, snapshot: int = 0) -> None:
    """What `sweep.py submit` and `resume` do: all trials that are not held, finished or cancelled."""
    cluster = cluster_of(manifest)
    with manifest.locked():
        states = trial_states(manifest, cluster)
        missing = [
            trial
            for trial in manifest.trials
            if not states[trial.id].held and states[trial.id].state not in ("finished", "cancelled")
        ]
        cluster.submit(manifest, missing, snapshot)


def wait_for_end(manifest: Manifest) -> None:
    """Until the controller has nothing left to do."""
    until(lambda: not background.is_running(manifest))


def test_two_devices_have_one_trial_each_at_a_time_and_submit_returns_at_once(tmp_path: Path) -> None:
    manifest = sweep_of(tmp_path / "s", FOR_A_MOMENT, 6, devices=[0, 1], threads_per_trial=3)
    submit(manifest)
    assert "finished" not in states(manifest)
    assert states(manifest).count("pending") >= 4
    wait_for_end(manifest)
    assert states(manifest) == ["finished"] * 6
    assert most_at_once(lives(manifest)) == 2
    (seen,) = {len(environments(manifest, number)) for number in range(6)}
    assert seen == 1, "a trial was begun more than once"
    devices = [environments(manifest, number)[0]["CUDA_VISIBLE_DEVICES"] for number in range(6)]
    assert set(devices) == {"0", "1"}
    for device in "01":
        mine = [span for span, used in zip(lives(manifest), devices, strict=True) if used == device]
        assert most_at_once(mine) == 1
    assert {environments(manifest, number)[0]["OMP_NUM_THREADS"] for number in range(6)} == {"3"}


def test_devices_are_shared_evenly(tmp_path: Path) -> None:
    manifest = sweep_of(tmp_path / "s", UNTIL_LET_GO, 5, devices=[4, 7], trials_per_device=2)
    submit(manifest)
    until(lambda: all(environments(manifest, number) for number in range(4)))
    assert states(manifest) == ["running"] * 4 + ["pending"]
    used = [environments(manifest, number)[0]["CUDA_VISIBLE_DEVICES"] for number in range(4)]
    assert sorted(used[:2]) == sorted(used[2:]) == ["4", "7"]
    (manifest.folder / "go").touch()
    wait_for_end(manifest)
    assert states(manifest) == ["finished"] * 5


def test_without_devices_the_environment_of_the_devices_is_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("RANK", "3")
    manifest = sweep_of(tmp_path / "s", FOR_A_MOMENT, 3, devices=[], trials_on_cpu=3)
    submit(manifest)
    wait_for_end(manifest)
    assert most_at_once(lives(manifest)) == 3
    assert "CUDA_VISIBLE_DEVICES" not in environments(manifest, 0)[0]
    assert "RANK" not in environments(manifest, 0)[0]


def test_max_parallel_of_the_sweep_bounds_the_pool(tmp_path: Path) -> None:
    manifest = sweep_of(tmp_path / "s", FOR_A_MOMENT, 3, devices=[], trials_on_cpu=3)
    manifest.sweep["max_parallel"] = 1
    manifest.write()
    submit(manifest)
    wait_for_end(manifest)
    assert most_at_once(lives(manifest)) == 1


def test_a_controller_that_is_killed_loses_and_doubles_no_trial(tmp_path: Path) -> None:
    manifest = sweep_of(tmp_path / "s", UNTIL_LET_GO, 6, devices=[0, 1])
    submit(manifest)
    until(lambda: states(manifest).count("running") == 2)
    kill_controller(manifest)
    assert states(manifest)[:2] == ["running", "running"]  # they go on without it
    submit(manifest)
    time.sleep(1)
    assert states(manifest) == ["running"] * 2 + ["pending"] * 4  # the two count against the slots
    (manifest.folder / "go").touch()
    wait_for_end(manifest)
    assert states(manifest) == ["finished"] * 6
    assert [len(environments(manifest, number)) for number in range(6)] == [1] * 6
    assert most_at_once(lives(manifest)) == 2


def test_a_device_stays_taken_by_a_trial_of_a_controller_that_was_killed(tmp_path: Path) -> None:
    first_only = UNTIL_LET_GO.replace("while not", 'while directory.name[:3] != "001" and not')
    manifest = sweep_of(tmp_path / "s", first_only, 3, devices=[0, 1])
    submit(manifest)
    until(lambda: environments(manifest, 0))
    kill_controller(manifest)
    until(lambda: not is_alive(manifest.directory(manifest.trials[1])))
    submit(manifest)
    until(lambda: environments(manifest, 2))
    taken, new = (environments(manifest, number)[0]["CUDA_VISIBLE_DEVICES"] for number in (0, 2))
    assert {taken, new} == {"0", "1"}
    (manifest.folder / "go").touch()
    wait_for_end(manifest)


def test_a_failing_trial_disturbs_none(tmp_path: Path) -> None:
    program = 'if directory.name.startswith("001"): sys.exit(1)\n' + FINISHES
    manifest = sweep_of(tmp_path / "s", program, 4, devices=[0, 1])
    submit(manifest)
    wait_for_end(manifest)
    assert states(manifest) == ["finished", "failed", "finished", "finished"]
    assert [end.exit_code for end in ends(manifest, 1)] == [1]


def test_what_fails_is_run_again_by_a_further_submission_alone(tmp_path: Path) -> None:
    program = 'if directory.name.startswith("001") and attempt == 1: sys.exit(1)\n' + FINISHES
    manifest = sweep_of(tmp_path / "s", program, 3, devices=[0, 1])
    submit(manifest)
    wait_for_end(manifest)
    submit(manifest)
    wait_for_end(manifest)
    assert states(manifest) == ["finished"] * 3
    assert [len(environments(manifest, number)) for number in range(3)] == [1, 2, 1]


def test_a_submission_reaches_the_controller_that_runs(tmp_path: Path) -> None:
    manifest = sweep_of(tmp_path / "s", UNTIL_LET_GO, 2, devices=[0, 1])
    cluster = cluster_of(manifest)
    controllers = set()
    for trial in list(manifest.trials):
        with manifest.locked():
            cluster.submit(manifest, [trial], 0)
        controllers.add(controller_of(manifest))
    until(lambda: states(manifest) == ["running"] * 2)
    assert len(controllers) == 1
    (manifest.folder / "go").touch()
    wait_for_end(manifest)


def test_a_second_controller_ends_at_once(tmp_path: Path) -> None:
    manifest = sweep_of(tmp_path / "s", UNTIL_LET_GO, 1, devices=[0])
    submit(manifest)
    second = [sys.executable, "-m", "dino.sweep.controller", str(manifest.folder)]
    subprocess.run(second, check=True, timeout=30)
    assert background.is_running(manifest)
    (manifest.folder / "go").touch()
    wait_for_end(manifest)
    assert (manifest.folder / background.LOG).read_text().count("begins") == 1


def test_cancelled_trials_save_and_stop_or_never_begin(tmp_path: Path) -> None:
    manifest = sweep_of(tmp_path / "s", WAITS, 3, devices=[0])
    submit(manifest)
    until(lambda: (manifest.directory(manifest.trials[0]) / "status.json").exists())
    with manifest.locked():
        manifest.mark_cancelled(manifest.trials, "by the test")
        cluster_of(manifest).cancel(manifest, manifest.trials)
    wait_for_end(manifest)
    assert states(manifest) == ["cancelled"] * 3
    assert status(manifest.directory(manifest.trials[0]))["state"] == "preempted"
    assert [len(environments(manifest, number)) for number in range(3)] == [1, 0, 0]


def test_a_supervisor_that_cannot_begin_is_a_failure_and_not_tried_for_ever(tmp_path: Path) -> None:
    manifest = sweep_of(tmp_path / "s", FINISHES, 2, devices=[0])
    broken = manifest.folder / "broken"
    (broken / "src" / "dino").mkdir(parents=True)
    (broken / "src" / "dino" / "__init__.py").write_text("raise RuntimeError('half a copy')")
    manifest.snapshots.insert(0, Snapshot("broken", digest(broken), "unknown", "nowhere"))
    manifest.write()
    submit(manifest, snapshot=0)
    wait_for_end(manifest)
    assert states(manifest) == ["failed"] * 2
    assert "supervisor ended before the trial began" in (details(manifest)[0].reason or "")
    assert len(attempts(manifest)) == 1
    submit(manifest, snapshot=1)
    wait_for_end(manifest)
    assert states(manifest) == ["finished"] * 2


def test_a_controller_that_cannot_start_is_said_by_submit(tmp_path: Path) -> None:
    manifest = sweep_of(tmp_path / "s", FINISHES, 1, devices=[0])
    module = manifest.folder / "code" / "src" / "dino" / "__init__.py"
    module.parent.mkdir(parents=True)
    module.write_text("raise RuntimeError('half a copy')")
    with pytest.raises(ValueError, match="its controller ended with 1"):
        submit(manifest)


def test_a_machine_short_of_files_gets_there_later(tmp_path: Path) -> None:
    """In place of one that is short of processes, which root never is."""
    manifest = sweep_of(tmp_path / "s", UNTIL_LET_GO, 2, devices=[0])
    submit(manifest)
    until(lambda: states(manifest)[0] == "running")
    pid = controller_of(manifest)
    usual = limit_files(pid, None)
    limit_files(pid, 3)
    (manifest.folder / "go").touch()
    until(lambda: "Too many open files" in (manifest.folder / background.LOG).read_text())
    assert not starts(manifest, 1)
    limit_files(pid, usual)
    wait_for_end(manifest)
    assert states(manifest) == ["finished"] * 2


def limit_files(pid: int, soft: int | None) -> int:
    """Sets how many files a process may have open; what it was before."""
    before, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    if soft is not None:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    return before


def test_a_sweep_that_is_deleted_leaves_no_controller(tmp_path: Path) -> None:
    manifest = sweep_of(tmp_path / "s", WAITS, 1, devices=[0])
    submit(manifest)
    until(lambda: (manifest.directory(manifest.trials[0]) / "status.json").exists())
    controller, supervisor = controller_of(manifest), starts(manifest)[0].pid
    assert str(manifest.folder) in command_of(controller)
    shutil.rmtree(manifest.folder)
    until(lambda: str(manifest.folder) not in command_of(controller))
    assert not manifest.folder.exists()  # it has not made it again
    with contextlib.suppress(ProcessLookupError):
        os.kill(supervisor, signal.SIGKILL)


def command_of(pid: int) -> str:
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_text() if path.exists() else ""


def test_another_machine_cannot_say_what_runs(tmp_path: Path) -> None:
    """Unless nothing does: the machine on which it ran may be gone for ever."""
    manifest = sweep_of(tmp_path / "s", FINISHES, 1, devices=[0])
    submit(manifest)
    wait_for_end(manifest)
    record = manifest.folder / background.RECORD
    record.write_text(json.dumps({**json.loads(record.read_text()), "host": "elsewhere"}))
    cluster = cluster_of(manifest)
    assert cluster.live(manifest) == {}
    with pytest.raises(ValueError, match="run on elsewhere; cancel them there"):
        cluster.cancel(manifest, manifest.trials)
    holds = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1); sys.stdin.read()"
    words = [sys.executable, "-u", "-c", holds, str(manifest.directory(manifest.trials[0]) / LOCK)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert cluster.live(manifest) is None
        holder.kill()


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [("0,1", ["0", "1"]), ("GPU-1f, 3", ["GPU-1f", "3"]), ("", []), ("-1", []), ("NoDevFiles", [])],
)
def test_the_devices_of_the_environment(chosen: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert visible_devices() == expected
    assert LocalCluster(trials_on_cpu=2).slots() == (expected or [None, None])


def test_the_devices_that_nvidia_smi_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = "GPU 0: H100 (UUID: GPU-a)\n  MIG 1g.10gb Device 0: (UUID: MIG-b)\nGPU 1: H100 (UUID: GPU-c)\n"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{listing}END\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert visible_devices() == ["0", "1"]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")  # a driver that does not answer
    assert visible_devices() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trials_per_device": 0}, "cluster.trials_per_device=0: use a whole number of at least 1"),
        ({"trials_on_cpu": -2}, "cluster.trials_on_cpu=-2: use"),
        ({"threads_per_trial": 0}, "cluster.threads_per_trial=0: use"),
        ({"devices": [0, "0"]}, "list each once"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalCluster(**settings)


PAUSING = '''
import torch

from dino.loss import DINOLoss


class Pausing(DINOLoss):
    """Stops in the debugger at the third step; then goes on or raises."""

    def __init__(self, fails, centering, student_temp, weighting, local_weight, koleo_weight, implementation):
        super().__init__(centering, student_temp, weighting, local_weight, koleo_weight, implementation)
        self.fails, self.count = fails, 0

    def forward(self, *args, **options):
        self.count += torch.is_grad_enabled()  # not in evaluations
        if self.count == 3 and torch.is_grad_enabled():
            breakpoint()
            if self.fails:
                raise RuntimeError("prototypes went missing")
        return super().forward(*args, **options)
'''


@pytest.mark.slow
def test_debug_runs_in_the_foreground_with_breakpoints_and_goes_on_after_a_failure(tmp_path: Path) -> None:
    (tmp_path / "pausing.py").write_text(PAUSING)

    def python(script: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(REPOSITORY / script), *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            input="p 'at', self.count, self.fails\nc\n" * 2,
            capture_output=True,
            text=True,
            timeout=120,
        )

    own = ["loss._target_=pausing.Pausing", "allowed_targets=[pausing]", "+loss.fails=true,false"]
    submitted = python("sweep.py", "submit", "cluster=debug", "sweep.dir=s", *TINY, *own)
    assert submitted.returncode == 0, submitted
    assert "('at', 3, True)" in submitted.stdout
    assert "('at', 3, False)" in submitted.stdout
    manifest = Manifest.read(tmp_path / "s")
    assert states(manifest) == ["failed", "finished"]
    assert "prototypes went missing" in (details(manifest)[0].reason or "")
    assert [end.exit_code for number in (0, 1) for end in ends(manifest, number)] == [1, 0]
    # In a process in which another trial has failed before, a trial is the run that it would be alone.
    second = manifest.directory(manifest.trials[1])
    alone = python("train.py", "--frozen", str(second / "config.yaml"), "run_dir=alone")
    assert alone.returncode == 0, alone
    assert_same_run(second, tmp_path / "alone")
