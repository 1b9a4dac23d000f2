"""Going on from weights: where a run starts, what learns first, and what is said when it forgets."""

from pathlib import Path

import pytest
import torch
from command_line import last_state, metrics, train

from dino.monitor import Facts, Health

# Features that know the digits, in seconds: wide enough for k-NN to fall from.
LONGER = ["trainer.epochs=4", "trainer.limit_steps_per_epoch=22", "optimizer.lr=3e-3"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    done = train("run_dir=first", "evaluation=knn", *LONGER, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "first"


def test_a_run_starts_where_the_weights_are_and_the_head_learns_first(first: Path, tmp_path: Path) -> None:
    weights = [f"backbone.weights={(first / 'checkpoints' / 'last.pt').resolve()}"]
    frozen = ["trainer.freeze_backbone_steps=6", "trainer.freeze_last_layer_epochs=0", "trainer.keep_checkpoints=9"]
    words = ["run_dir=second", "evaluation=knn", "trainer.save_every_steps=3", "trainer.epochs=2", *weights, *frozen]
    done = train(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path / "second")
    before = next(line for line in reversed(metrics(first)) if "val/knn_top1" in line)
    assert lines[0]["step"] == 0
    assert lines[0]["val/knn_top1"] == before["val/knn_top1"]
    assert f"the loaded weights {before['val/knn_top1']:.1f} %" in done.stdout

    states = {
        step: torch.load(tmp_path / "second" / "checkpoints" / f"step_{step:08d}.pt", weights_only=True)["model"]
        for step in (3, 6, 9)
    }
    source = last_state(first)["model"]
    for network in ("student", "teacher"):
        names = [name for name in source if name.startswith(f"{network}.backbone.")]
        for step in (3, 6):
            teachers = [source[name.replace("student", "teacher")] for name in names]
            assert all(torch.equal(states[step][name], of_file) for name, of_file in zip(names, teachers, strict=True))
        assert not all(torch.equal(states[9][name], states[6][name]) for name in names)
        heads = [name for name in source if name.startswith(f"{network}.head.mlp")]
        assert not all(torch.equal(states[3][name], states[6][name]) for name in heads)
    moves = [line for line in lines if line.get("cause") == "backbone_unfrozen"]
    assert [line["step"] for line in moves] == [6]


def test_a_frozen_backbone_is_refused_for_a_number_that_is_none(tmp_path: Path) -> None:
    done = train("trainer.freeze_backbone_steps=-1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: trainer.freeze_backbone_steps=-1: use a whole number of at least 0\n"


def test_nothing_to_go_on_from_is_refused(tmp_path: Path) -> None:
    done = train("experiment=continue_from_weights", f"dataset.root={tmp_path}", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: backbone.weights=null: trainer.freeze_backbone_steps=500 keeps the backbone")


def health(**settings: object) -> Health:
    watch = Health()
    watch.facts = Facts(total_steps=100, settled_step=0, settings={"optimizer.lr": 1e-3, **settings})
    return watch


def test_what_the_weights_knew_is_missed_when_it_is_lost() -> None:
    watch = health(**{"backbone.weights": "file.pt", "trainer.freeze_backbone_steps": 0})
    assert watch.observe(0, {"val/knn_top1": 80.0}) == []
    assert watch.observe(10, {"val/knn_top1": 75.5}) == []
    (verdict,) = watch.observe(20, {"val/knn_top1": 74.0})
    assert verdict.kind == "features_lost"
    assert not verdict.severe
    assert "k-NN has fallen from the 80.0 % of the loaded weights to 74.0 %" in verdict.text
    assert "trainer.freeze_backbone_steps=0: try 500" in verdict.text


def test_a_run_from_scratch_has_nothing_to_lose() -> None:
    watch = health(**{"backbone.weights": None})
    watch.observe(0, {"val/knn_top1": 50.0})
    assert watch.observe(10, {"val/knn_top1": 40.0}) == []
