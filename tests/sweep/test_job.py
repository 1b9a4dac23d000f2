"""The supervisor of a trial, started as a local pool starts it."""

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import finish, spawn
from handmade_sweep import FINISHES, WAITS, attempts, ends, environments, handmade_sweep, set_state, starts, submitted
from sweep_command import until

from dino.sweep.job import LOCK
from dino.sweep.manifest import Manifest
from dino.sweep.training_process import num_killed_for_memory


def start(manifest: Manifest, submission: str, number: int = 0, **environment: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "dino.sweep.job", str(manifest.folder), manifest.trials[number].id, submission]
    return spawn(words, cwd=manifest.folder, environment=environment)


def run(manifest: Manifest, submission: str) -> subprocess.CompletedProcess[str]:
    return finish(start(manifest, submission), timeout=60)


def begun(manifest: Manifest) -> bool:
    return (manifest.directory(manifest.trials[0]) / "status.json").exists()


def test_a_trial_that_finishes(tmp_path: Path) -> None:
    manifest = handmade_sweep(tmp_path / "s", FINISHES)
    submission = submitted(manifest)
    assert run(manifest, submission).returncode == 0
    (start_line,), (end,) = starts(manifest), ends(manifest)
    assert (start_line.submission, start_line.job, start_line.step) == (submission, None, 0)
    assert (end.exit_code, end.signal, end.cause, end.requeued, end.step) == (0, None, None, False, 9)
    assert run(manifest, submission).returncode == 0, "it is finished"
    assert len(environments(manifest)) == 1, "and is not run again"


def test_what_does_not_begin(tmp_path: Path) -> None:
    """Cancelled: quietly. Code that was changed since: refused, and written down. Unknown: in a sentence."""
    manifest = handmade_sweep(tmp_path / "s", FINISHES)
    submission = submitted(manifest)
    manifest.mark_cancelled(manifest.trials, "by hand")
    assert run(manifest, submission).returncode == 0
    assert attempts(manifest) == []
    manifest.unmark_cancelled(manifest.trials[0])
    (manifest.folder / "code" / "train.py").write_text("raise SystemExit(0)")
    refused = run(manifest, submission)
    assert refused.returncode == 2
    assert [(end.exit_code, end.reason) for end in ends(manifest)] == [
        (2, f"{manifest.folder}/code is no longer what was submitted; submit the trial again")
    ]
    unknown = run(manifest, "nothing")
    assert (unknown.returncode, unknown.stderr) == (2, f"nothing: no such submission in {manifest.folder}\n")
    assert environments(manifest) == []


@pytest.mark.parametrize(
    ("program", "exit_code", "expected"),
    [
        ("raise RuntimeError('mine')", 1, (1, None, False)),
        ("sys.exit(3)", 3, (3, None, False)),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, (None, "SIGKILL", False)),
        ("os._exit(137)", 137, (137, None, True)),
        ("sys.exit(75)", 75, (75, None, False)),
    ],
)
def test_each_end_is_written_down(
    tmp_path: Path, program: str, exit_code: int, expected: tuple[int | None, str | None, bool]
) -> None:
    manifest = handmade_sweep(tmp_path / "s", program)
    assert run(manifest, submitted(manifest)).returncode == exit_code
    (end,) = ends(manifest)
    assert (end.exit_code, end.signal, end.out_of_memory) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_the_supervisor_alone_reaches_the_training(tmp_path: Path, number: signal.Signals) -> None:
    manifest = handmade_sweep(tmp_path / "s", WAITS)
    process = start(manifest, submitted(manifest))
    until(lambda: begun(manifest))
    process.send_signal(number)
    assert finish(process, timeout=20).returncode == 75
    (end,) = ends(manifest)
    assert (end.exit_code, end.signal, end.cause, end.requeued) == (75, None, "preempted", False)


def test_ctrl_c_in_a_terminal_saves(tmp_path: Path) -> None:
    """The terminal gives SIGINT to both; a second one to the training would end it at once."""
    counts = "count = []\nwhen_asked(lambda name: count.append(name))\nstatus('running', 1)\n"
    manifest = handmade_sweep(
        tmp_path / "s", f"{counts}time.sleep(2)\nsys.exit(75 if count.count('SIGINT') == 1 else 130)"
    )
    process = start(manifest, submitted(manifest))
    until(lambda: begun(manifest))
    subprocess.run(["kill", "-INT", "--", f"-{process.pid}"], check=True)
    assert finish(process, timeout=20).returncode == 75


def test_a_signal_before_the_training_listens_is_a_preemption(tmp_path: Path) -> None:
    """Again and again at any moment of the start: it is never a failure, and never lost."""
    manifest = handmade_sweep(tmp_path / "s", f"time.sleep(0.3)\n{WAITS}")
    submission = submitted(manifest)
    for delay_s in (0.25, 0.4, 0.6, 0.9):
        process = start(manifest, submission)
        until(lambda: (manifest.directory(manifest.trials[0]) / LOCK).exists())
        time.sleep(delay_s)
        process.send_signal(signal.SIGTERM)
        assert finish(process, timeout=20).returncode == 75
    assert {(end.exit_code, end.cause) for end in ends(manifest)} == {(75, "preempted")}
    assert len(ends(manifest)) == 4


def test_a_training_does_not_outlive_its_supervisor(tmp_path: Path) -> None:
    manifest = handmade_sweep(tmp_path / "s", WAITS)
    process = start(manifest, submitted(manifest))
    until(lambda: begun(manifest))
    process.kill()
    status = manifest.directory(manifest.trials[0]) / "status.json"
    until(lambda: "preempted" in status.read_text(), timeout=20)
    finish(process)
    assert ends(manifest) == []


@pytest.mark.slow
def test_a_trial_never_runs_twice_at_once(tmp_path: Path) -> None:
    manifest = handmade_sweep(tmp_path / "s", WAITS)
    submission = submitted(manifest)
    first = start(manifest, submission)
    until(lambda: begun(manifest))
    second = run(manifest, submission)
    assert second.returncode == 0
    assert "another process works on this trial" in second.stdout
    assert len(attempts(manifest)) == len(environments(manifest)) == 1
    first.terminate()
    finish(first)


def test_a_second_job_waits_for_one_on_its_way_out(tmp_path: Path) -> None:
    manifest = handmade_sweep(tmp_path / "s", FINISHES)
    with (manifest.directory(manifest.trials[0]) / LOCK).open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        process = start(manifest, submitted(manifest))
        time.sleep(2)
        assert attempts(manifest) == []
    assert finish(process).returncode == 0
    assert len(ends(manifest)) == 1


def test_a_failed_trial_is_tried_again(tmp_path: Path) -> None:
    manifest = handmade_sweep(
        tmp_path / "s", f"if attempt < 3: sys.exit(1)\n{FINISHES}", sweep={"on_failure": "retry:2"}
    )
    assert run(manifest, submitted(manifest)).returncode == 0
    assert [end.exit_code for end in ends(manifest)] == [1, 1, 0]


def test_no_more_often_than_asked_and_never_with_a_bad_configuration(tmp_path: Path) -> None:
    manifest = handmade_sweep(tmp_path / "s", "sys.exit(1)", sweep={"on_failure": "retry:1"})
    for submission in (submitted(manifest), submitted(manifest)):  # each has its own count
        assert run(manifest, submission).returncode == 1
    assert [end.exit_code for end in ends(manifest)] == [1] * 4
    manifest = handmade_sweep(tmp_path / "t", "sys.exit(2)", sweep={"on_failure": "retry:1"})
    assert run(manifest, submitted(manifest)).returncode == 2
    assert len(ends(manifest)) == 1


def test_one_failure_stops_the_others(tmp_path: Path) -> None:
    local = {"_target_": "dino.sweep.local.LocalCluster"}
    manifest = handmade_sweep(tmp_path / "s", "sys.exit(1)", 4, sweep={"on_failure": "stop"}, cluster=local)
    set_state(manifest, 1, "finished")
    set_state(manifest, 2, "failed")
    assert run(manifest, submitted(manifest)).returncode == 1
    reason = f"trial {manifest.trials[0].id} failed and sweep.on_failure=stop"
    assert [manifest.cancelled(trial) for trial in manifest.trials] == [None, None, None, reason]


def test_the_training_finds_the_code_of_the_snapshot(tmp_path: Path) -> None:
    manifest = handmade_sweep(tmp_path / "s", FINISHES)
    finish(start(manifest, submitted(manifest), PYTHONPATH="/opt/mine"))
    (environment,) = environments(manifest)
    assert environment["PYTHONPATH"] == f"{manifest.folder}/code/src:/opt/mine"


def test_fewer_cores_than_asked_for_are_said(tmp_path: Path) -> None:
    manifest = handmade_sweep(tmp_path / "s", FINISHES)
    said = finish(start(manifest, submitted(manifest), SLURM_CPUS_PER_TASK="4096")).stdout
    cores = len(os.sched_getaffinity(0))
    assert f"warning: only {cores} cores are usable, though cluster.cpus_per_task=4096" in said


def test_a_training_that_the_system_kills_for_want_of_memory(tmp_path: Path, little_memory: Path) -> None:
    manifest = handmade_sweep(tmp_path / "s", "bytearray(300 * 2**20)")
    job = [sys.executable, "-m", "dino.sweep.job", str(manifest.folder), manifest.trials[0].id, submitted(manifest)]
    enter = f"echo $$ > {little_memory}/cgroup.procs && exec {shlex.join(job)}"
    assert finish(spawn(["bash", "-c", enter], cwd=tmp_path), timeout=60).returncode == 137
    (end,) = ends(manifest)
    assert (end.exit_code, end.signal, end.out_of_memory) == (None, "SIGKILL", True)


@pytest.fixture
def little_memory() -> Iterator[Path]:
    """A control group of 100 MiB."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    by_kind = {kinds: name for _, kinds, name in (line.split(":", 2) for line in lines)}
    top = Path("/sys/fs/cgroup/memory") if "memory" in by_kind else Path("/sys/fs/cgroup")
    group = top / by_kind.get("memory", by_kind.get("", "/")).lstrip("/") / f"test_{os.getpid()}"
    try:
        group.mkdir()
        limit = group / ("memory.limit_in_bytes" if "memory" in by_kind else "memory.max")
        limit.write_text(str(100 * 2**20))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    yield group
    until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def test_the_accounts_of_memory(tmp_path: Path) -> None:
    """As Linux writes them in version 1 and 2 of control groups, and in a container that knows no other name than /."""
    own, cgroups = tmp_path / "cgroup", tmp_path / "fs"
    version_2, version_1 = cgroups / "slurm/job_1", cgroups / "memory/slurm/job_1"
    for folder in (version_2, version_1):
        folder.mkdir(parents=True)
    assert num_killed_for_memory(cgroups, own) == 0
    (cgroups / "memory" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    own.write_text("4:cpu,memory:/elsewhere\n")
    assert num_killed_for_memory(cgroups, own) == 1
    (version_1 / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    own.write_text("9:name=systemd:/\n4:cpu,memory:/slurm/job_1\n0::/\n")
    assert num_killed_for_memory(cgroups, own) == 2
    (version_2 / "memory.events").write_text("low 0\noom 5\noom_kill 3\noom_group_kill 0\n")
    own.write_text("0::/slurm/job_1\n")
    assert num_killed_for_memory(cgroups, own) == 3
