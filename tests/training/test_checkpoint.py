"""Checkpoints: whole or not at all, verified, the newest valid one found by itself."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from dino.training import checkpoint
from dino.training.checkpoint import CheckpointStore


def state(value: float) -> dict[str, Any]:
    return {"step": int(value), "weights": torch.full((64,), value), "nested": [{"betas": (0.9, 0.999)}, None, "text"]}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    path = CheckpointStore(tmp_path, keep=2).save(7, state(7), {"train/loss": 1.0}, best=False)
    assert path.name == "step_00000007.pt"
    for loaded in (checkpoint.load(path), checkpoint.load(tmp_path / "last.pt")):
        assert torch.equal(loaded["weights"], state(7)["weights"])
        assert (loaded["step"], loaded["nested"]) == (7, state(7)["nested"])


def test_only_the_newest_stay_and_the_best_is_never_pruned(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in range(1, 6):
        store.save(step, state(step), {}, best=step == 2)
    assert {name for name in names(tmp_path) if name.endswith(".pt")} == {
        "step_00000002.pt",
        "step_00000004.pt",
        "step_00000005.pt",
        "last.pt",
        "best.pt",
    }
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 2
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 5
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]


@pytest.mark.parametrize("damage", ["truncate", "flip", "no checksum"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2):
        store.save(step, state(step), {}, best=False)
    newest = tmp_path / "step_00000002.pt"
    content = bytearray(newest.read_bytes())
    if damage == "truncate":
        newest.write_bytes(content[:-20])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
    else:
        newest.with_suffix(".json").unlink()
    logging.getLogger("dino").propagate = True
    with caplog.at_level(logging.WARNING, logger="dino"):
        assert store.newest_valid() == tmp_path / "step_00000001.pt"
    assert "step_00000002.pt" in caplog.text
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(newest)


def test_foreign_types_are_refused_at_save_and_leave_no_file(tmp_path: Path) -> None:
    class Foreign(list[int]):
        pass

    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    with pytest.raises(TypeError, match=r"state\['optimizer'\]\['betas'\] is a Foreign"):
        store.save(1, {"optimizer": {"betas": Foreign([1])}}, {}, best=False)
    assert not (tmp_path / "checkpoints").exists()


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such checkpoint"):
        checkpoint.load(tmp_path / "step_00000001.pt")
    assert CheckpointStore(tmp_path, keep=1).newest_valid() is None
