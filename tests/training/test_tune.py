"""`dino tune batch`: the search, on memory that is a formula; and the command, on real runs of seconds."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import DINO, TINY, last_state, metrics, run

from dino.training.tune import (
    Found,
    Trial,
    available_gib,
    find_largest,
    has_batch_norm,
    keeping_effective_batch,
    run_trial,
)
from dino.validation import checked

GIB = 1.0


def machine(*, constant: float, per_image: float, runs_out_at: float = float("inf")) -> Callable[[int], Trial]:
    """Trials on a machine where memory is linear in the batch, and whose processes die beyond `runs_out_at`."""

    def measure(batch_size: int) -> Trial:
        peak = constant + per_image * batch_size
        return Trial(batch_size) if peak > runs_out_at else Trial(batch_size, peak, 1.0)

    return measure


@pytest.mark.parametrize("per_image", [0.001, 0.01, 0.13, 0.5])
@pytest.mark.parametrize(("budget", "runs_out_at"), [(8 * GIB, float("inf")), (8 * GIB, 8 * GIB), (8 * GIB, 5 * GIB)])
@pytest.mark.parametrize("multiple", [1, 8])
def test_the_largest_multiple_that_fits_is_found_in_few_trials(
    per_image: float, budget: float, runs_out_at: float, multiple: int
) -> None:
    limit = 3000
    best = int((min(budget, runs_out_at) - 1) / per_image + 1e-6)
    best = min(best, limit) // multiple * multiple
    trials = find_largest(
        machine(constant=1.0, per_image=per_image, runs_out_at=runs_out_at), budget, multiple=multiple, limit=limit
    )
    found = max((trial.batch_size for trial in trials if trial.fits(budget)), default=0)
    assert len(trials) <= 14
    if budget <= runs_out_at:
        assert found == best
    else:  # below what the line says; halved down to it
        assert 0.9 * best - multiple <= found <= best
    assert all(trial.batch_size % multiple == 0 for trial in trials)


def test_no_trial_takes_much_more_than_the_budget() -> None:
    asked: list[int] = []
    flat_then_steep = machine(constant=1.0, per_image=0.01)

    def measure(batch_size: int) -> Trial:
        asked.append(batch_size)
        trial = flat_then_steep(batch_size)
        return Trial(batch_size, 1.2, 1.0) if batch_size <= 16 else trial  # small ones lie below a floor

    trials = find_largest(measure, 4.0, multiple=8, limit=100_000)
    assert max(trial.batch_size for trial in trials if trial.fits(4.0)) == 296
    assert max(asked) <= 8 * 296 / 2
    assert len(asked) == len(set(asked))


def test_where_nothing_fits_this_is_said() -> None:
    trials = find_largest(machine(constant=9.0, per_image=1.0), 8.0, multiple=8, limit=64)
    found = Found(trials, [], 8.0, 64, accumulates=True)
    assert found.largest is None
    (line,) = found.advice()
    assert line.startswith("no batch fits")


@pytest.mark.parametrize(
    ("effective", "largest", "expected"),
    [(64, 48, (32, 2)), (64, 64, (64, 1)), (64, 500, (64, 1)), (60, 16, (15, 4)), (7, 6, (1, 7))],
)
def test_advice_keeps_the_effective_batch(effective: int, largest: int, expected: tuple[int, int]) -> None:
    assert keeping_effective_batch(effective, largest) == expected
    found = Found([Trial(largest, 1.0, 1.0)], [], 2.0, effective, accumulates=True)
    batch_size, steps = expected
    assert f"dataset.batch_size={batch_size} trainer.accumulate_steps={steps}:" in found.advice()[-1]


def test_a_batch_that_cannot_be_made_of_parts_is_not_advised() -> None:
    found = Found([Trial(16, 1.0, 1.0)], [], 2.0, 64, accumulates=False)
    assert not any("accumulate_steps" in line for line in found.advice())


def test_batch_norm_is_told_of_in_the_advice() -> None:
    found = Found([Trial(16, 1.0, 1.0)], [], 2.0, 64, accumulates=True, batch_norm=True)
    assert found.advice()[-1].endswith("steps of 64 images, of which batch norm sees 16 at a time")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [([], False), (["head.batch_norm=true"], True), (["backbone=resnet18"], True)],
)
def test_batch_norm_is_found(overrides: list[str], expected: bool) -> None:
    assert has_batch_norm(checked(overrides)[0]) == expected


def test_there_is_memory_and_not_more_than_the_machine_has() -> None:
    free = available_gib(torch.device("cpu"))
    total = int(re.findall(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[0]) / 2**20
    assert 0 < free < total


# ---------------------------------------------------------------------- the command


def tune(*words: str, cwd: Path) -> tuple[int, str, str]:
    done = run([DINO, "tune", "batch", *words], cwd=cwd)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_command_measures_real_runs_and_advises_overrides(tmp_path: Path) -> None:
    words = ["--multiple", "16", "--max-batch", "32", "--memory-gib", "64"]
    exit_code, stdout, stderr = tune(*words, *TINY, "trainer.accumulate_steps=2", "loss.koleo_weight=0", cwd=tmp_path)
    assert (exit_code, [line.split(":")[0] for line in stderr.splitlines()[:2]]) == (0, ["batch 16", "batch 32"]), (
        stderr
    )
    rows = [re.findall(r"[\w.-]+", line) for line in stdout.splitlines() if "fits" in line]
    assert {row[1] for row in rows} == {"16", "32"}
    assert all(0.1 < float(row[2]) < 8 and float(row[3]) > 1 for row in rows)
    assert "largest     dataset.batch_size=32" in stdout
    assert "advice      dataset.batch_size=32 trainer.accumulate_steps=4: steps of 128 images" in stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["dataset.batch_siz=3"], "did you mean dataset.batch_size?"),
        (["--multiple", "5000"], "--multiple=5000: a batch has at most 1437 images here; use 1437 or less"),
    ],
)
def test_what_cannot_be_tried_is_answered_in_a_sentence(words: list[str], sentence: str, tmp_path: Path) -> None:
    exit_code, _, stderr = tune(*words, cwd=tmp_path)
    assert exit_code == 2
    assert stderr.splitlines() == [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert sentence in stderr


def test_a_trial_fills_the_optimizer_and_saves_before_its_peak_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, real = tmp_path / "left", subprocess.run

    def keeping_what_is_left(command: list[str], **options: Any) -> Any:
        done = real(command, **options)
        shutil.copytree(Path(command[-1]).parent, left, symlinks=True)
        return done

    monkeypatch.setattr(subprocess, "run", keeping_what_is_left)
    trial = run_trial(checked(TINY)[0], 16)
    assert trial.peak_gib is not None
    optimizer = last_state(left)["optimizer"]
    assert len(optimizer["state"]) == sum(len(group["params"]) for group in optimizer["param_groups"])
    first, _ = sorted((left / "checkpoints").glob("*.json"))
    saved = json.loads(first.read_text())["saved"]
    assert saved < [line for line in metrics(left) if "perf/peak_memory_gib" in line][-1]["time"]


@pytest.mark.slow
def test_runs_that_get_no_memory_are_told_from_runs_that_fail(tmp_path: Path) -> None:
    words = [*TINY, "allowed_targets=[injected]", "--max-batch", "8"]
    exit_code, stdout, stderr = tune(*words, "loss._target_=injected.HungryLoss", cwd=tmp_path)
    assert (exit_code, stderr) == (1, "batch 8: out of memory\n")
    assert "no batch fits" in stdout
    exit_code, _, stderr = tune(*words, "loss._target_=injected.DyingRank", cwd=tmp_path)
    assert (exit_code, stderr) == (2, "error: dataset.batch_size=8: the trial failed: KeyError: 'RANK'\n")
