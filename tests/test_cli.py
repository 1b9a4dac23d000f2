"""The `dino` command, on the bundled digits and on checkpoints of a few numbers."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dino.cli import app
from dino.training.checkpoint import CheckpointStore


def run(*words: str) -> tuple[int, str, str]:
    torch.set_num_threads(1)
    result = CliRunner().invoke(app, list(words))
    return result.exit_code, result.stdout, result.stderr


def test_data_check_counts_the_digits() -> None:
    exit_code, stdout, _ = run("data", "check")
    assert exit_code == 0
    assert "1437" in stdout.replace(",", "")
    assert "360" in stdout


def test_data_preview_writes_a_picture_of_the_views(tmp_path: Path) -> None:
    path = tmp_path / "views.png"
    exit_code, stdout, _ = run(
        "data", "preview", "augmentation.num_local_views=2", "--output", str(path), "--num-images", "3"
    )
    assert exit_code == 0
    assert f"{path}: 3 images of digits" in stdout
    with Image.open(path) as image:
        assert np.asarray(image).std() > 10  # something is drawn


@pytest.mark.parametrize("command", [["data", "check"], ["data", "preview"], ["debug", "loss"]])
def test_bad_overrides_are_answered_as_by_train(command: list[str]) -> None:
    exit_code, stdout, stderr = run(*command, "loss.teacher_tmp=1", "trainer.epochs=0")
    assert exit_code == 2
    assert stdout == ""
    assert stderr.splitlines() == [
        "error: loss.teacher_tmp: there is no such key; did you mean loss.teacher_temp?",
        "error: trainer.epochs=0: use a whole number of at least 1",
    ]


def test_data_that_is_not_there_is_answered_too(tmp_path: Path) -> None:
    exit_code, _, stderr = run("data", "check", "dataset=folder", f"dataset.root={tmp_path}")
    assert exit_code == 2
    assert len(stderr.splitlines()) == 1
    assert str(tmp_path) in stderr


def save_three(run_dir: Path) -> Path:
    folder = run_dir / "checkpoints"
    store = CheckpointStore(folder, keep=2)
    for step in (4, 8, 12):
        metrics = {"train/loss": 10 / step, "val/knn_top1": step / 16, "perf/images_per_s": 5.0}
        store.save(step, {"weights": torch.ones(1000)}, metrics, best_step=8, stays=step == 4)
    store.wait()
    return folder


def test_checkpoints_lists_step_size_validity_marks_and_metrics(tmp_path: Path) -> None:
    folder = save_three(tmp_path)
    os.truncate(folder / "step_00000012.pt", 100)
    exit_code, stdout, stderr = run("checkpoints", str(tmp_path))
    header, newest, middle, oldest = stdout.splitlines()
    assert (exit_code, stderr) == (0, "")
    assert header.split() == ["file", "step", "saved", "size", "state", "marks", "metrics"]
    assert newest.startswith("step_00000012.pt  12 ")
    assert " 100 B " in newest
    assert "damaged: its size is 100 bytes, but " in newest
    assert newest.endswith("last   train/loss 0.83333, val/knn_top1 0.75")
    assert " KiB " in middle
    assert middle.split("valid")[1].split() == ["best", "train/loss", "1.25,", "val/knn_top1", "0.5"]
    assert oldest.split("valid")[1].split() == ["stays", "train/loss", "2.5,", "val/knn_top1", "0.25"]
    assert run("checkpoints", str(folder)) == (exit_code, stdout, stderr)


def test_checkpoints_without_a_valid_one_exits_with_1(tmp_path: Path) -> None:
    for path in save_three(tmp_path).glob("*.json"):
        path.unlink()
    exit_code, stdout, stderr = run("checkpoints", str(tmp_path))
    assert (exit_code, stderr) == (1, "there is no valid checkpoint\n")
    assert stdout.count("damaged: its checksum file") == 3
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "status.json").write_text("{}")
    assert run("checkpoints", str(tmp_path / "young"))[0] == 1


def test_checkpoints_says_how_many_files_are_lost_instead_of_an_empty_table(tmp_path: Path) -> None:
    for path in save_three(tmp_path).glob("*.pt"):
        path.unlink()
    exit_code, stdout, stderr = run("checkpoints", str(tmp_path))
    assert (exit_code, stdout) == (1, "")
    assert stderr == "there is no valid checkpoint; sidecars (step_*.json) whose file is gone: 3\n"


def test_checkpoints_tells_a_folder_from_a_file(tmp_path: Path) -> None:
    (save_three(tmp_path) / "step_00000016.pt").mkdir()
    exit_code, stdout, _ = run("checkpoints", str(tmp_path))
    assert exit_code == 0
    assert "damaged: it is a folder, not a file" in stdout.splitlines()[1]


@pytest.mark.parametrize(
    ("path", "problem"), [("absent", "there is no such directory"), (".", "no run directory"), ("file", "no such")]
)
def test_checkpoints_of_what_is_no_run_are_refused(tmp_path: Path, path: str, problem: str) -> None:
    (tmp_path / "file").touch()
    exit_code, stdout, stderr = run("checkpoints", str(tmp_path / path))
    assert (exit_code, stdout) == (2, "")
    (line,) = stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / path}: ")
    assert problem in line


def test_checkpoints_needs_no_torch(tmp_path: Path) -> None:
    save_three(tmp_path)
    script = "import sys; sys.modules['torch'] = None; from dino.cli import main; main()"
    command = [sys.executable, "-c", script, "checkpoints", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(" valid ") == 3
