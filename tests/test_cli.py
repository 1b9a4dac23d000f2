"""The `dino` command, on the bundled digits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dino import debug
from dino.cli import app
from dino.config import compose
from dino.debug import inspect_loss
from dino.loss import DINOLoss

SMALL = ["dataset.batch_size=8", "head.out_dim=32", "head.hidden_dim=16", "head.bottleneck_dim=8"]


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


@pytest.mark.parametrize("extra", [[], ["augmentation.num_local_views=0"], ["loss.weighting=balanced"]])
def test_debug_loss_shows_every_intermediate_and_agrees_with_the_reference(extra: list[str]) -> None:
    exit_code, stdout, _ = run("debug", "loss", *SMALL, *extra)
    assert exit_code == 0, stdout
    for name in ("global_views", "student_views[0]", "teacher_probabilities[1]", "pair_losses[0,1]", "center_after"):
        assert name in stdout
    assert "WRONG" not in stdout
    assert "global term equals the step-by-step one" in stdout
    assert "no gradient reaches the teacher" in stdout


def test_debug_loss_says_what_it_cannot_check() -> None:
    exit_code, stdout, _ = run("debug", "loss", *SMALL, "loss/centering=sinkhorn")
    assert exit_code == 0
    assert "not checked" in stdout


def test_debug_loss_notices_a_wrong_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    right = DINOLoss._cross_entropy
    monkeypatch.setattr(DINOLoss, "_cross_entropy", lambda *arguments: 1.01 * right(*arguments))
    exit_code, stdout, _ = run("debug", "loss", *SMALL)
    assert exit_code == 1
    assert "WRONG" in stdout


def test_debug_loss_notices_gradients_that_do_not_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    build = debug.build

    def with_cut_head(config: object, key: str, **runtime: object) -> object:
        built = build(config, key, **runtime)
        if key == "head":
            built.mlp[0].weight.register_hook(torch.zeros_like)
        return built

    monkeypatch.setattr(debug, "build", with_cut_head)
    (check,) = [
        check for check in inspect_loss(compose(SMALL)).checks if "student" in check.name and "grad" in check.name
    ]
    assert check.holds is False
    assert "none at head.mlp.0.weight" in check.detail


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
