"""Whole runs that are killed, signalled, damaged and starved, at the real command line: the result is the same bits.

Each scenario ends in the comparison of `assert_same_run`: everything in the last checkpoint and every line of
`metrics.jsonl` against a run that nothing happened to.
"""

import contextlib
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import (
    assert_same_run,
    command,
    differences,
    finish,
    last_state,
    metrics,
    spawn,
    start,
    start_ranks,
    status,
    train,
    wait_until,
)

# Two epochs of six steps, each of two micro-batches, one of which has no finite loss; a checkpoint every other step.
EVENTFUL = [
    "run_dir=run",
    "dataset.batch_size=32",
    "trainer.accumulate_steps=2",
    "loss.koleo_weight=0",
    "trainer.save_every_steps=2",
    "trainer.keep_checkpoints=3",
    "backbone.drop_path_rate=0.3",
    "evaluation.knn.every_epochs=1",
    "monitor.early_stopping.patience=5",
    "monitor.health.max_confidence=0",  # every step is one of an entropy collapse
    "monitor.health.patience_steps=2",
    "monitor.health.repeat_steps=3",
    "loss._target_=injected.InfiniteLoss",
    "+loss.at=[9]",
    "allowed_targets=[injected]",
]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
GRACE_S = 30  # how long a cluster waits between the signal and SIGKILL


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("undisturbed"), EVENTFUL)


def finished_run(folder: Path, overrides: list[str]) -> Path:
    result = train(*overrides, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "run"


def copy_run(run_dir: Path, to: Path, *, up_to: int) -> Path:
    """The run as it was when the checkpoint of step `up_to` was its newest, but for the lines logged since."""
    shutil.copytree(run_dir, to / "run", symlinks=True)
    for path in (to / "run" / "checkpoints").glob("step_*"):
        if int(path.stem.removeprefix("step_")) > up_to:
            path.unlink()
    link = to / "run" / "checkpoints" / "last.pt"
    link.unlink()
    link.symlink_to(f"step_{up_to:08d}.pt")
    return to / "run"


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_in_mid_epoch_is_exact(undisturbed: Path, tmp_path: Path, workers: int) -> None:
    """After the skipped step 5, in the second epoch, from step 8 of 12; the lines logged since are written again."""
    run_dir = copy_run(undisturbed, tmp_path, up_to=8)
    assert last_state(run_dir)["non_finite"] == {"num_skipped": 1}
    result = train(*EVENTFUL, f"dataset.num_workers={workers}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "step 8" in result.stdout
    assert_same_run(run_dir, undisturbed)


@pytest.mark.parametrize("metric", ["val/knn_top1", pytest.param("train/entropy_teacher", marks=pytest.mark.slow)])
def test_early_stopping_is_exact_after_a_resume(tmp_path: Path, metric: str) -> None:
    """A metric that can never improve: the run ends after two more epochs, resumed in between or not."""
    stopping = [
        *("run_dir=run", "trainer.epochs=9", "trainer.limit_steps_per_epoch=3", "trainer.save_every_steps=1"),
        *("trainer.keep_checkpoints=99", "evaluation.knn.every_epochs=1", "monitor.early_stopping.patience=2"),
        *("monitor.early_stopping.min_delta=100", "monitor.early_stopping.restore_best=true"),
        *(f"monitor.early_stopping.metric={metric}", "monitor.early_stopping.mode=max"),
    ]
    whole = tmp_path / "whole"
    whole.mkdir()
    result = train(*stopping, cwd=whole)
    assert result.returncode == 0, result.stderr
    assert f"early stopping: {metric} has not improved" in result.stdout
    record = status(whole / "run")
    assert (record["state"], record["step"]) == ("finished", 9)
    assert (whole / "run/checkpoints/last.pt").resolve() == (whole / "run/checkpoints/best.pt").resolve()
    assert last_state(whole / "run")["step"] == 3
    parts = tmp_path / "parts"
    run_dir = copy_run(whole / "run", parts, up_to=5)
    assert train(*stopping, cwd=parts).returncode == 0
    assert_same_run(run_dir, whole / "run")
    newest = [folder / "checkpoints/step_00000009.pt" for folder in (run_dir, whole / "run")]
    ours, theirs = (torch.load(path, weights_only=True) for path in newest)
    assert ours["early_stopping"] == theirs["early_stopping"]
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=0, atol=0)


@pytest.mark.slow
def test_a_compiled_run_resumes_exactly(tmp_path: Path) -> None:
    compiled = ["run_dir=run", "trainer.compile=true", "trainer.save_every_steps=5", "trainer.keep_checkpoints=9"]
    whole = tmp_path / "whole"
    whole.mkdir()
    result = train(*compiled, cwd=whole)
    assert result.returncode == 0, result.stderr
    run_dir = copy_run(whole / "run", tmp_path / "parts", up_to=5)
    assert train(*compiled, cwd=tmp_path / "parts").returncode == 0
    assert_same_run(run_dir, whole / "run")


@pytest.mark.slow
def test_what_changes_results_is_refused_unless_it_is_asked_for_by_name(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = copy_run(undisturbed, tmp_path, up_to=8)
    changes = ("loss.teacher_temp=0.05", "dataset.batch_size=64", "trainer.accumulate_steps=1")
    refused = train(*EVENTFUL, *changes, cwd=tmp_path)
    assert refused.returncode == 2
    for words in ("loss.teacher_temp: 0.02 -> 0.05", "dataset.batch_size: 32 -> 64", "schedule.teacher_temp.base"):
        assert words in refused.stderr
    suggested = re.search(r"resume_changes=\[\S+\]", refused.stderr)
    assert suggested is not None
    assert suggested[0] == "resume_changes=[dataset.batch_size,loss.teacher_temp,trainer.accumulate_steps]"
    other_meaning = train(*EVENTFUL, "resume_changes=[dataset]", "dataset.batch_size=64", cwd=tmp_path)
    assert other_meaning.returncode == 2
    assert "use those, or go on in another run_dir with resume=" in other_meaning.stderr
    misspelt = train(*EVENTFUL, "resume_changes=[los.teacher_temp]", cwd=tmp_path)
    assert "did you mean loss.teacher_temp" in misspelt.stderr
    assert status(run_dir)["state"] == "finished", "a refused command has touched the record of the run"
    allowed = train(*EVENTFUL, *changes, suggested[0], cwd=tmp_path)
    assert allowed.returncode == 0, allowed.stderr
    assert "changed     loss.teacher_temp: 0.02 -> 0.05" in allowed.stdout


def test_a_run_that_is_done_keeps_its_record(undisturbed: Path, tmp_path: Path) -> None:
    """It was not trained with the settings of a later command, and is not shorter than it is."""
    run_dir = copy_run(undisturbed, tmp_path, up_to=12)
    config, lines = (run_dir / "config.yaml").read_text(), metrics(run_dir)
    shorter = train(*EVENTFUL, "trainer.max_steps=10", cwd=tmp_path)
    assert shorter.returncode == 2
    assert "trainer.max_steps=10: that is step 10, and " in shorter.stderr
    assert "step_00000012.pt is of step 12 already; give more, or another run_dir" in shorter.stderr
    changed = train(*EVENTFUL, "loss.teacher_temp=0.05", "resume_changes=[loss.teacher_temp]", cwd=tmp_path)
    assert changed.returncode == 0, changed.stderr
    assert "nothing is left to train" in changed.stdout
    assert (run_dir / "config.yaml").read_text() == config
    assert metrics(run_dir) == lines


def test_another_batch_counts_its_steps_anew_in_another_directory(undisturbed: Path, tmp_path: Path) -> None:
    """The limit of six steps an epoch stays, so 4 steps of 64 images into it are 2 steps of 128."""
    checkpoint = copy_run(undisturbed, tmp_path, up_to=10) / "checkpoints" / "step_00000010.pt"
    overrides = [word for word in EVENTFUL if word != "run_dir=run"]
    result = train(
        *overrides,
        *("run_dir=other", f"resume={checkpoint}", "dataset.batch_size=64", "resume_changes=[dataset.batch_size]"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "step 10 of 64 images is step 8 of 128 images" in result.stdout
    assert [line["step"] for line in metrics(tmp_path / "other") if "train/loss" in line] == [9, 10, 11, 12]


# ---------------------------------------------------------------------- killed


@pytest.mark.slow
def test_killed_at_25_random_moments(tmp_path: Path) -> None:
    """SIGKILL to the whole group, every third time while a checkpoint is being written."""
    long = [
        *("run_dir=run", "trainer.epochs=60", "trainer.limit_steps_per_epoch=11", "trainer.save_every_steps=3"),
        *("evaluation.knn.every_epochs=2", "evaluation.validation_loss.every_epochs=3", "head.out_dim=16384"),
        *("dataset.num_workers=2", "backbone.drop_path_rate=0.2", "trainer.keep_every_epochs=5"),
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    result = train(*long, cwd=whole)
    assert result.returncode == 0, result.stderr
    run_dir = parts / "run"
    moments = random.Random(0)
    killed_while_writing = 0
    for attempt in range(25):
        before = newest_step(run_dir)
        process = start(*long, cwd=parts)
        wait_until(lambda before=before: newest_step(run_dir) > before, process)
        if attempt % 3 == 0:
            wait_until(lambda: list((run_dir / "checkpoints").glob("*.tmp")), process)
        else:
            time.sleep(moments.uniform(0, 0.2))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run was over before all kills: make it longer"
        killed_while_writing += bool(list((run_dir / "checkpoints").glob("*.tmp")))
    assert killed_while_writing > 3
    last = train(*long, cwd=parts)
    assert last.returncode == 0, last.stderr
    assert "ended without a word" in last.stdout
    assert not list((run_dir / "checkpoints").glob("*.tmp"))
    assert_same_run(run_dir, whole / "run")


def newest_step(run_dir: Path) -> int:
    return max((int(path.stem.removeprefix("step_")) for path in run_dir.glob("checkpoints/step_*.pt")), default=-1)


# ---------------------------------------------------------------------- signalled


@pytest.mark.parametrize("workers", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_signalled_run_goes_on_exactly(undisturbed: Path, tmp_path: Path, workers: int) -> None:
    """SIGTERM to the whole group, workers and all, in mid-epoch."""
    run_dir = tmp_path / "run"
    process = start(*EVENTFUL, f"dataset.num_workers={workers}", cwd=tmp_path)
    wait_until(lambda: newest_step(run_dir) >= 4, process)
    interrupted = end_by(signal.SIGTERM, process, group=True)
    assert interrupted.returncode == 75, interrupted.stderr
    record = status(run_dir)
    assert (record["state"], record["reason"], record["exit_code"]) == ("preempted", "SIGTERM", 75)
    assert last_state(run_dir)["step"] == record["step"] >= 4
    resumed = train(*EVENTFUL, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(run_dir, undisturbed)


def end_by(number: signal.Signals, process: subprocess.Popen[str], *, group: bool) -> subprocess.CompletedProcess[str]:
    """Sends the signal; the end must come within the grace period."""
    if group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    return finish(process, timeout=GRACE_S)


def is_starting_up(run_dir: Path) -> bool:
    time.sleep(1)
    return True


def is_training(run_dir: Path) -> bool:
    return (run_dir / "metrics.jsonl").exists() and '"step": 3' in (run_dir / "metrics.jsonl").read_text()


def is_evaluating(run_dir: Path) -> bool:
    return (run_dir.parent / "evaluating").exists()


def is_saving(run_dir: Path) -> bool:
    return bool(list((run_dir / "checkpoints").glob("*.tmp")))


PHASES: dict[str, Callable[[Path], bool]] = {
    "starting up": is_starting_up,
    "training": is_training,
    "evaluating": is_evaluating,
    "saving": is_saving,
}
PHASE_RUN = [
    *("run_dir=run", "evaluation.knn.every_epochs=1", "evaluation.knn._target_=injected.AnnouncedKNN"),
    *("allowed_targets=[injected]", "trainer.save_every_steps=1", "head.out_dim=16384"),
]


@pytest.fixture(scope="module")
def undisturbed_phases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("phases"), PHASE_RUN)


def phase_cases() -> Iterator[Any]:
    """Every signal in every phase; each with 0 and 4 workers, to the process and to its group, by turns."""
    for index, (phase, number) in enumerate(itertools.product(PHASES, SIGNALS)):
        workers, group = (0, 4)[(index // 2) % 2], index % 2 == 1
        name = f"{number.name} to the {'group' if group else 'process'} while {phase} with {workers} workers"
        yield pytest.param(phase, number, workers, group, id=name)


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "number", "workers", "group"), list(phase_cases()))
def test_any_signal_in_any_phase(
    undisturbed_phases: Path, tmp_path: Path, phase: str, number: signal.Signals, workers: int, group: bool
) -> None:
    run_dir = tmp_path / "run"
    process = start(*PHASE_RUN, f"dataset.num_workers={workers}", cwd=tmp_path)
    wait_until(lambda: PHASES[phase](run_dir), process)
    interrupted = end_by(number, process, group=group)
    assert interrupted.returncode == 75, interrupted.stderr
    assert status(run_dir)["state"] == "preempted"
    assert status(run_dir)["reason"] == number.name
    if phase == "evaluating":
        state = last_state(run_dir)
        assert state["evaluated_step"] != state["step"] == 6, "the evaluation was not cut short"
    resumed = train(*PHASE_RUN, f"dataset.num_workers={4 - workers}", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(run_dir, undisturbed_phases)


def test_a_second_sigint_stops_at_once(tmp_path: Path) -> None:
    """The first one waits for the evaluation, which sleeps for a second before it looks; the second does not."""
    process = start(*PHASE_RUN, cwd=tmp_path)
    wait_until(lambda: is_evaluating(tmp_path / "run"), process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    result = end_by(signal.SIGINT, process, group=False)
    assert result.returncode == 130
    assert status(tmp_path / "run")["reason"] == "interrupted"


def test_handlers_that_were_there_before_are_called_after_the_save(tmp_path: Path) -> None:
    """As a job manager does it: its handler is installed, then the program runs in the same process."""
    program = tmp_path / "manager.py"
    program.write_text(
        "import runpy, signal, sys\n"
        "from pathlib import Path\n"
        "def requeue(number, frame):\n"
        "    print('requeue:', Path('run/status.json').read_text().count('preempted'),\n"
        "          len(list(Path('run/checkpoints').glob('step_*.pt'))))\n"
        "signal.signal(signal.SIGUSR2, requeue)\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    words = [*command(), "run_dir=run", "trainer.epochs=500", "trainer.save_every_epochs=null"]
    process = spawn([words[0], str(program), *words[1:]], cwd=tmp_path)
    wait_until(lambda: is_training(tmp_path / "run"), process)
    result = end_by(signal.SIGUSR2, process, group=False)
    assert result.returncode == 75, result.stderr
    assert "requeue: 1 " in result.stdout
    assert "requeue: 1 0" not in result.stdout


# ---------------------------------------------------------------------- damaged, starved


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over(undisturbed: Path, tmp_path: Path) -> None:
    damages: dict[str, Callable[[Path], None]] = {
        "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
        "one byte flipped": flip_a_byte,
        "deleted": Path.unlink,
    }
    for name, damage in damages.items():
        run_dir = copy_run(undisturbed, tmp_path / name, up_to=10)
        newest = run_dir / "checkpoints" / "step_00000010.pt"
        damage(newest)
        result = train(*EVENTFUL, cwd=tmp_path / name)
        assert result.returncode == 0, result.stderr
        warnings = [line for line in result.stdout.splitlines() if "using the one before it" in line]
        assert len(warnings) == 1, result.stdout
        assert newest.name in warnings[0]
        assert "step_00000008.pt, step 8" in result.stdout
        assert_same_run(run_dir, undisturbed)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_malicious_checkpoint_is_refused_without_running_anything(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "it_ran",)

    path = tmp_path / "checkpoint.pt"
    torch.save({"step": 1, "model": Malicious()}, path)
    assert pickle.dumps(Malicious())
    result = train("run_dir=run", f"resume={path}", cwd=tmp_path)
    assert result.returncode == 2
    assert f"error: resume={path}: not a checkpoint of a run, or a copy without what lay beside it" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert not (tmp_path / "it_ran").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small tmpfs is for root: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Takes all the room that there is, but for `leave` bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while leave == 0 or shutil.disk_usage(disk).free > leave:
            file.write(bytes(4096))
    return filler


@pytest.mark.slow
@pytest.mark.parametrize("on_save_error", ["warn", "stop"])
def test_a_full_disk_is_named_and_destroys_nothing(small_disk: Path, on_save_error: str) -> None:
    """Another program fills the disk in mid-run; with `warn` it is emptied again before the end."""
    overrides = [
        "run_dir=run",
        "trainer.epochs=150",
        "evaluation=[]",
        "trainer.save_every_steps=3",
        f"trainer.on_save_error={on_save_error}",
    ]
    process = start(*overrides, cwd=small_disk)
    wait_until(lambda: newest_step(small_disk / "run") >= 6, process)
    filler = fill(small_disk)
    if on_save_error == "warn":
        time.sleep(2)
        filler.unlink()
        assert process.poll() is None, "the run was over before the disk was emptied: make it longer"
    result = finish(process)
    assert "checkpoint of step" in result.stdout
    assert "free at" in result.stdout or "No space left" in result.stdout
    if on_save_error == "warn":
        assert result.returncode == 0, result.stdout + result.stderr
        assert [line["step"] for line in metrics(small_disk / "run") if "train/loss" in line] == list(range(1, 901))
        assert last_state(small_disk / "run")["step"] == 900
    else:
        assert result.returncode == 1
        filler.unlink()
        assert train(*overrides, cwd=small_disk).returncode == 0
        assert last_state(small_disk / "run")["step"] == 900


def test_running_out_of_memory_says_what_to_turn_down(tmp_path: Path) -> None:
    result = train("run_dir=run", "loss._target_=injected.HungryLoss", "allowed_targets=[injected]", cwd=tmp_path)
    assert result.returncode == 1
    reason = status(tmp_path / "run")["reason"]
    for words in ("out of memory", "dataset.batch_size=64", "trainer.accumulate_steps=2", "num_local_views"):
        assert words in reason


@pytest.mark.slow
def test_a_full_disk_under_two_ranks_ends_the_run_and_leaves_no_rank_behind(small_disk: Path) -> None:
    """Only rank 0 meets it; the other learns of it."""
    long = ["run_dir=run", "trainer.epochs=60", "trainer.save_every_steps=3", "evaluation=[]", "dataset.batch_size=32"]
    processes = start_ranks(2, *long, cwd=small_disk)
    wait_until(lambda: newest_step(small_disk / "run") >= 6, processes[0])
    fill(small_disk)
    results = [finish(process, timeout=120) for process in processes]
    assert [result.returncode for result in results] == [1, 1], results
    assert "No space left" in results[0].stdout or "free at" in results[0].stdout


@pytest.mark.slow
def test_a_last_checkpoint_that_cannot_be_written_is_a_failure(small_disk: Path) -> None:
    """Also where the run goes on after every other failed save."""
    fill(small_disk, leave=600_000)
    result = train("run_dir=run", "head.out_dim=4096", cwd=small_disk)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "SaveError: checkpoint of step 12 needs" in result.stdout
    assert "when that is put right, the same command goes on from the beginning" in result.stdout
    assert status(small_disk / "run")["state"] == "failed"


@pytest.mark.slow
def test_a_second_process_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    long = ("run_dir=run", "trainer.epochs=900", "trainer.save_every_steps=3", "evaluation=[]")
    first = start(*long, cwd=tmp_path)
    wait_until(lambda: newest_step(tmp_path / "run") >= 3, first)
    second = train(*long, cwd=tmp_path)
    assert second.returncode == 2, second.stdout + second.stderr
    assert f"process {first.pid} on " in second.stderr
    assert first.poll() is None
    assert end_by(signal.SIGTERM, first, group=False).returncode == 75
    steps = [line["step"] for line in metrics(tmp_path / "run") if "train/loss" in line]
    assert steps == list(range(1, len(steps) + 1))


def test_a_pipe_that_is_closed_ends_no_run(tmp_path: Path) -> None:
    process = start("run_dir=run", cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("device")
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert "trained     12 steps" in (tmp_path / "run" / "train.log").read_text()


# ---------------------------------------------------------------------- from a given checkpoint


@pytest.mark.slow
def test_resume_from_a_path_can_be_typed_again(undisturbed: Path, tmp_path: Path) -> None:
    """From another run, then from what came of it; and back to an older one of its own, which sets newer ones aside."""
    start_point = undisturbed / "checkpoints" / "step_00000008.pt"
    elsewhere = [*EVENTFUL, f"resume={start_point}"]
    assert train(*elsewhere, "trainer.max_steps=10", cwd=tmp_path).returncode == 0
    again = train(*elsewhere, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "goes on from its newest checkpoint" in again.stdout
    assert "step_00000010.pt, step 10" in again.stdout
    run_dir = tmp_path / "run"
    whole = (run_dir / "metrics.jsonl").read_text()
    back = train(*EVENTFUL, f"resume={run_dir}/checkpoints/step_00000010.pt", "trainer.max_steps=11", cwd=tmp_path)
    assert back.returncode == 0, back.stderr
    abandoned = run_dir / "checkpoints" / "abandoned"
    assert [path.name for path in abandoned.glob("*.pt")] == ["step_00000012.pt"]
    assert (abandoned / "step_00000012.metrics.jsonl").read_text() == whole
    assert last_state(run_dir)["step"] == 11
    foreign = train(*EVENTFUL, f"resume={undisturbed}/checkpoints/step_00000010.pt", cwd=tmp_path)
    assert foreign.returncode == 2
    assert "has checkpoints of its own" in foreign.stderr


def test_without_any_valid_checkpoint_a_run_is_refused_not_started_anew(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = copy_run(undisturbed, tmp_path, up_to=12)
    for path in (run_dir / "checkpoints").glob("step_*.pt"):
        path.write_bytes(b"")
    lines = metrics(run_dir)
    result = train(*EVENTFUL, cwd=tmp_path)
    assert result.returncode == 2
    assert f"run_dir={run_dir}: none of its checkpoints is valid (" in result.stderr
    assert f"; give resume=PATH of a good one, or remove {run_dir}/checkpoints and use resume=never" in result.stderr
    assert metrics(run_dir) == lines


def test_a_run_whose_checkpoints_are_gone_is_refused_and_loses_nothing_when_it_starts_anew(
    undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = copy_run(undisturbed, tmp_path, up_to=12)
    before = (run_dir / "metrics.jsonl").read_text()
    shutil.rmtree(run_dir / "checkpoints")
    refused = train(*EVENTFUL, cwd=tmp_path)
    assert refused.returncode == 2
    assert f"run_dir={run_dir}: it had a checkpoint of step 12, and now has none" in refused.stderr
    assert "resume=never to start anew" in refused.stderr
    assert (run_dir / "metrics.jsonl").read_text() == before
    assert status(run_dir)["state"] == "finished"
    anew = train(*EVENTFUL, "resume=never", cwd=tmp_path)
    assert anew.returncode == 0, anew.stderr
    assert (run_dir / "checkpoints" / "abandoned" / "metrics.jsonl").read_text() == before
    assert_same_run(run_dir, undisturbed)


def test_what_a_finished_run_has_said_stays_when_its_metrics_are_gone(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = copy_run(undisturbed, tmp_path, up_to=12)
    before = (run_dir / "training_summary.json").read_text()
    (run_dir / "report.html").write_text("what was found")
    (run_dir / "metrics.jsonl").unlink()
    result = train(*EVENTFUL, "monitor.report=true", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "metrics.jsonl has lost lines: 0 of " in result.stdout
    assert (run_dir / "training_summary.json").read_text() == before
    assert (run_dir / "report.html").read_text() == "what was found"


# ---------------------------------------------------------------------- not finite


@pytest.mark.slow
def test_an_infinite_loss_is_explained_and_passed_over(tmp_path: Path) -> None:
    """At step 7: a file that explains it, an event, and the same student, teacher and center as before."""
    injected = [
        *("run_dir=run", "loss._target_=injected.InfiniteLoss", "+loss.at=[7,9,10]", "allowed_targets=[injected]"),
        *("trainer.save_every_steps=1", "trainer.keep_checkpoints=99", "trainer.max_skipped_steps=2"),
    ]
    result = train(*injected, cwd=tmp_path)
    assert result.returncode == 3, result.stdout + result.stderr
    run_dir = tmp_path / "run"
    assert "trainer.max_skipped_steps=2 are used up" in status(run_dir)["reason"]
    events = [line for line in metrics(run_dir) if "event" in line]
    skipped = [line["step"] for line in events if line["event"] == "skipped_step"]
    assert skipped == [7, 9, 10], "the last one too, which ended the run"
    assert [line["step"] for line in events if line.get("verdict") == "non_finite"] == [7]
    states = {
        step: torch.load(run_dir / "checkpoints" / f"step_{step:08d}.pt", weights_only=True) for step in range(6, 10)
    }
    assert not differences(states[7]["model"], states[6]["model"])
    for parameter, moments in states[6]["optimizer"]["state"].items():
        assert not differences(states[7]["optimizer"]["state"][parameter], moments)
    centers = {step: state["loss"]["centering.center"] for step, state in states.items()}
    assert torch.equal(centers[6], centers[7])
    assert not torch.equal(centers[7], centers[8])
    assert newest_step(run_dir) == 9
    diagnosis = read_json(run_dir / "non_finite" / "step_00000007.json")
    assert diagnosis["step"] == 7
    assert diagnosis["loss"]["total"] == "inf"
    assert len(diagnosis["sample_indices"][0]) == 64
    assert diagnosis["views"][0]["global"][0]["num_non_finite"] == 0
    assert diagnosis["scheduled"]["teacher_temp"] == pytest.approx(0.02)
    assert {"max_abs", "norm"} <= diagnosis["layers"]["backbone.patch_embed.proj"].keys()
    assert diagnosis["gradient_norms"]["head.mlp.0.weight"] == "nan"
    again = train(*injected, cwd=tmp_path)
    assert again.returncode == 3
    allowed = train(*injected, "trainer.max_skipped_steps=3", cwd=tmp_path)
    assert allowed.returncode == 0, allowed.stderr


@pytest.mark.slow
def test_features_that_are_not_finite_end_a_run_like_a_loss_that_is_not(tmp_path: Path) -> None:
    """One step so large that the network overflows, and then an evaluation of it."""
    too_large = [
        "optimizer.lr=1e30",
        "schedule.lr.warmup_epochs=0",
        "trainer.epochs=1",
        "trainer.limit_steps_per_epoch=1",
    ]
    result = train("run_dir=run", *too_large, cwd=tmp_path)
    assert result.returncode == 3, result.stdout + result.stderr
    assert "k-NN got features that are not finite: the network that made them has diverged" in result.stdout
    assert status(tmp_path / "run")["exit_code"] == 3


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


# ---------------------------------------------------------------------- several ranks


RANKS_RUN = ["run_dir=run", "dataset.batch_size=32", "trainer.save_every_steps=2", "backbone.drop_path_rate=0.3"]


@pytest.mark.slow
def test_two_ranks_are_one_run_and_a_signal_to_one_stops_both_at_the_same_step(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    results = [finish(process) for process in start_ranks(2, *RANKS_RUN, cwd=whole)]
    assert [result.returncode for result in results] == [0, 0], results
    assert results[1].stdout == ""
    assert len(list(whole.rglob("status.json"))) == 1
    processes = start_ranks(2, *RANKS_RUN, "dataset.num_workers=1", cwd=parts)
    wait_until(lambda: newest_step(parts / "run") >= 4, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    results = [finish(process, timeout=GRACE_S) for process in processes]
    assert [result.returncode for result in results] == [75, 75], results
    assert status(parts / "run")["state"] == "preempted"
    resumed = [finish(process) for process in start_ranks(2, *RANKS_RUN, cwd=parts)]
    assert [result.returncode for result in resumed] == [0, 0], resumed
    assert_same_run(parts / "run", whole / "run")
    alone = train(*RANKS_RUN, cwd=parts)
    assert alone.returncode == 2
    assert "world_size: 2 -> 1" in alone.stderr
    same_batch = ("dataset.batch_size=64", "resume_changes=[world_size,dataset.batch_size]", "trainer.epochs=3")
    fewer = train(*RANKS_RUN, *same_batch, "resume_changes=[world_size,dataset.batch_size,trainer.epochs]", cwd=parts)
    assert fewer.returncode == 0, fewer.stderr


@pytest.mark.parametrize("killed", [False, True])
def test_a_rank_that_dies_takes_the_other_down_and_is_named(tmp_path: Path, killed: bool) -> None:
    dying = (f"loss._target_=injected.{'KilledRank' if killed else 'DyingRank'}", "allowed_targets=[injected]")
    processes = start_ranks(2, *RANKS_RUN, *dying, cwd=tmp_path)
    results = [finish(process, timeout=60) for process in processes]
    assert results[0].returncode == 1, results[0]
    assert results[1].returncode == (-signal.SIGKILL if killed else 1)
    record = status(tmp_path / "run")
    assert record["state"] == "failed"
    if killed:
        assert "the connection to another rank is lost: it has failed, was killed" in record["reason"]
    else:
        assert record["reason"] == "rank 1: RuntimeError: this rank has had enough"
        assert "this rank has had enough" in results[1].stderr
        assert "this rank has had enough" in (tmp_path / "run" / "train.log").read_text()
