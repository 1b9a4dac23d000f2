"""The host does not wait for the device at steps that are not logged: counted where tensors become numbers."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY
from torch import Tensor

from dino.run import Run
from dino.training import Trainer, TrainStep, assemble
from dino.validation import checked

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")  # each of them waits for a GPU
THE_FLAG = "__bool__"  # of a broken step: on a CPU it is read at once, on a GPU a step later from the host's memory


def make_trainer(folder: Path, *overrides: str) -> Trainer:
    tiny = [override for override in TINY if not override.startswith("monitor.every_steps")]
    config, _ = checked([*tiny, "evaluation=[]", "trainer.limit_steps_per_epoch=15", *overrides])
    logging.getLogger("dino").setLevel(logging.ERROR)
    run = Run(folder / "run", {})
    trainer = assemble(config, run)
    run.directory.mkdir()
    return trainer


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the reads so far."""
    found: list[str] = []
    for name in READS:
        original = getattr(Tensor, name)

        def counted(self: Tensor, *arguments: Any, name: str = name, original: Any = original) -> Any:
            found.append(name)
            return original(self, *arguments)

        monkeypatch.setattr(Tensor, name, counted)
    return found


def by_step(trainer: Trainer, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[int, list[str]]:
    """Step (from 1) -> the reads of the algorithm and of what follows it; filled while the trainer runs."""
    found: dict[int, list[str]] = {}
    step_of, after = TrainStep.__call__, trainer._after_step

    def train_step(self: TrainStep, step: int, window: Any, *, observe: bool) -> Any:
        reads.clear()
        output = step_of(self, step, window, observe=observe)
        found[step + 1] = list(reads)
        return output

    def after_step(*arguments: Any) -> None:
        reads.clear()
        after(*arguments)
        found[trainer.step] += reads

    monkeypatch.setattr(TrainStep, "__call__", train_step)
    monkeypatch.setattr(trainer, "_after_step", after_step)
    return found


@pytest.mark.parametrize("more", [(), ("loss.weighting=adaptive", "trainer.clip_mode=global_norm")])
def test_only_a_logged_step_reads_and_only_once(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    trainer = make_trainer(tmp_path, *more)
    found = by_step(trainer, reads, monkeypatch)
    trainer.fit()
    assert len(found) == 30
    logged = [1, 10, 20, 30]
    for step, names in found.items():
        assert names == [THE_FLAG] + ["tolist"] * (step in logged), (step, names)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_not_waited_for_between_logged_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, "trainer.device=cuda")
    after = trainer._after_step

    def after_step(*arguments: Any) -> None:
        torch.cuda.set_sync_debug_mode("default" if trainer.step in (1, 10, 20, 30) else "error")
        after(*arguments)
        torch.cuda.set_sync_debug_mode("error" if trainer.step > 2 else "default")

    monkeypatch.setattr(trainer, "_after_step", after_step)
    try:
        trainer.fit()  # a step that waits raises
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.step == 30
