"""`python train.py` at the real command line: a complete run directory, resuming, sweeps, failures."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml
from command_line import REPOSITORY, TINY, metrics, run, status, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of two short epochs, never interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    result = train("run_dir=run", "trainer.save_every_steps=4", "trainer.keep_checkpoints=9", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "run", result.stdout


def test_a_run_leaves_a_complete_directory(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    names = {path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file()}
    assert {"config.yaml", "status.json", "metrics.jsonl", "train.log", "training_summary.json"} <= names
    assert ".hydra/config.yaml" in names
    assert {f"checkpoints/{name}.pt" for name in ("step_00000004", "step_00000012", "last", "best")} <= names
    record = status(run_dir)
    assert (record["state"], record["step"], record["exit_code"]) == ("finished", 12, 0)
    assert {"host", "commit", "torch"} <= record.keys()
    summary = json.loads((run_dir / "training_summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["metrics"]["train/loss"].keys() == {"final", "mean", "min", "max", "best", "best_step"}


def test_metrics_have_the_promised_names_and_sane_values(finished: tuple[Path, str]) -> None:
    lines = metrics(finished[0])
    logged = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in logged] == list(range(1, 13))
    promised = {"train/loss_global", "train/loss_local", "train/entropy_teacher", "train/lr", "perf/images_per_s"}
    assert all(promised <= line.keys() for line in logged)
    assert all(0 < line["train/loss"] < 2 * math.log(64) for line in logged)
    evaluated = [line for line in lines if "val/knn_top1" in line]
    assert [line["step"] for line in evaluated] == [0, 12]
    assert all(0 <= line["val/knn_top1"] <= 100 for line in evaluated)
    assert evaluated[0]["val/knn_top1_pixels"] > 60


def test_the_first_lines_say_what_will_run_and_the_last_what_came_of_it(finished: tuple[Path, str]) -> None:
    _, output = finished
    for words in ("precision fp32", "1,437 training images", "peak lr", "half of it is older", "12 steps", "run "):
        assert words in output, words
    ending = output[output.rindex("k-NN") - 400 :]
    for words in ("untrained", "raw pixels", "metrics.jsonl", "dino evaluate", "resume=auto trainer.epochs=MORE"):
        assert words in ending, words


def test_every_file_in_checkpoints_loads_without_running_code(finished: tuple[Path, str]) -> None:
    for path in (finished[0] / "checkpoints").glob("*.pt"):
        state = torch.load(path, weights_only=True)
        assert {
            "step",
            "model",
            "loss",
            "optimizer",
            "scaler",
            "rng",
            "loader",
            "early_stopping",
            "settings",
        } <= state.keys()


@pytest.mark.slow
def test_a_changed_setting_is_refused_on_resume_and_a_harmless_one_is_not(tmp_path: Path) -> None:
    assert train("run_dir=run", "trainer.max_steps=2", cwd=tmp_path).returncode == 0
    record = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*") if path.is_file()}
    assert {path.name for path in record} >= {"status.json", "train.log", "metrics.jsonl", "config.yaml"}
    refused = train("run_dir=run", "loss.student_temp=0.2", cwd=tmp_path)
    assert refused.returncode == 2
    assert "loss.student_temp: 0.1 -> 0.2" in refused.stderr
    never = train("run_dir=run", "resume=never", cwd=tmp_path)
    assert never.returncode == 2
    assert "would be overwritten" in never.stderr
    assert {path: path.read_bytes() for path in record} == record
    longer = train("run_dir=run", "trainer.max_steps=3", "monitor.every_steps=2", cwd=tmp_path)
    assert longer.returncode == 0, longer.stderr


def test_what_only_the_data_can_tell_is_refused_in_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    result = train("run_dir=run", "dataset.batch_size=100000", cwd=tmp_path)
    assert result.returncode == 2
    assert "dataset.batch_size" in result.stderr
    assert "1437" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert not (tmp_path / "run").exists()


def test_a_loss_that_stays_non_finite_ends_with_exit_code_3_and_its_reason(tmp_path: Path) -> None:
    overrides = ("optimizer.lr=1e30", "trainer.clip_norm=0", "schedule.lr.warmup_epochs=0", "run_dir=run")
    result = train(*overrides, "trainer.max_skipped_steps=2", cwd=tmp_path)
    assert result.returncode == 3, result.stdout + result.stderr
    assert status(tmp_path / "run")["state"] == "failed"
    assert "trainer.max_skipped_steps=2 are used up" in status(tmp_path / "run")["reason"]
    assert "Traceback" in (tmp_path / "run" / "train.log").read_text()
    assert "Traceback" not in result.stdout + result.stderr


def test_a_multirun_trains_every_point_in_a_directory_of_its_own(tmp_path: Path) -> None:
    points = ("loss.teacher_temp=0.04,0.07", "ema.momentum=0.99,0.996")
    words = [sys.executable, str(REPOSITORY / "train.py"), "-m", *TINY, *points, "trainer.max_steps=2"]
    result = run(words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    status_files = sorted((tmp_path / "outputs" / "sweeps").rglob("status.json"))
    assert len(status_files) == 4
    assert all(json.loads(path.read_text())["state"] == "finished" for path in status_files)
    configs = [yaml.safe_load((path.parent / "config.yaml").read_text()) for path in status_files]
    assert {(config["loss"]["teacher_temp"], config["ema"]["momentum"]) for config in configs} == {
        (0.04, 0.99),
        (0.04, 0.996),
        (0.07, 0.99),
        (0.07, 0.996),
    }
