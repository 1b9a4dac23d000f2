"""What is looked at: the networks and the loss of a run, or freshly initialised ones, and the batch that comes next."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from dino.augmentation import ViewBatch
from dino.config import build, changes_results
from dino.dataset import TrainLoader
from dino.frozen import load_frozen
from dino.loss import DINOLoss
from dino.messages import ConfigError
from dino.model import MultiCropModel, StudentTeacher
from dino.runtime import choose_device, set_seeds
from dino.training import checkpoint
from dino.training.assemble import epoch_length
from dino.training.checkpoint import CheckpointStore


@dataclass(frozen=True)
class Subject:
    """The state before a step, and the views of its first micro-batch."""

    origin: str  # where networks and loss come from
    step: int  # finished optimizer steps
    steps_per_epoch: int
    teacher_temp: float  # of this step
    model: StudentTeacher
    loss: DINOLoss
    views: ViewBatch  # float, on the device


def is_path(word: str) -> bool:
    """Whether the first argument names a run directory or a config.yaml; otherwise it is an override."""
    return "=" not in word and not word.startswith("~")


def subject_of_path(path: Path, overrides: Sequence[str]) -> Subject:
    """A run directory: its config and its newest valid checkpoint, only read; a config.yaml: freshly initialised.

    Overrides are those that leave results alone, such as `trainer.device=cpu`.

    Raises:
        ValueError: for a path that is neither, a changed config.yaml, and where all checkpoints are damaged.
    """
    file = path / "config.yaml" if path.is_dir() else path
    if not file.is_file():
        missing = "holds no config.yaml" if path.is_dir() else "there is no such run directory or file"
        raise ValueError(f"{path}: {missing}; give a run directory, a config.yaml, or overrides such as seed=1")
    for override in overrides:
        if changes_results(override.partition("=")[0]):
            raise ValueError(
                f"{override}: changes results; of a run set only what does not, such as trainer.device=cpu"
            )
    try:
        # The run may be anybody's, and what it was resumed from may be gone: neither is needed to look at it.
        config = load_frozen(["--frozen", str(file), "run_dir=.", "resume=auto", *overrides])
    except ConfigError as error:
        raise ConfigError([problem.removeprefix("--frozen ") for problem in error.problems]) from None
    newest = CheckpointStore(path / "checkpoints", keep=1).newest_valid() if path.is_dir() else None
    if newest is not None:
        return subject_of(config, checkpoint.load(newest), origin=str(newest))
    return subject_of(config, origin=f"{path}{' (no checkpoint yet)' if path.is_dir() else ''}, freshly initialised")


def subject_of(
    config: DictConfig, state: dict[str, Any] | None = None, *, origin: str = "freshly initialised"
) -> Subject:
    """Networks and loss of `config`, as in the `state` of a checkpoint where one is given."""
    device = choose_device(config.trainer.device)
    set_seeds(config.seed)
    dataset, options = build(config, "dataset"), build(config, "trainer")
    mean, std = dataset.normalization()
    augmentation = build(config, "augmentation", mean=mean, std=std)
    loader = TrainLoader(dataset, augmentation, seed=config.seed)
    backbone = build(config, "backbone")
    model = StudentTeacher(MultiCropModel(backbone, build(config, "head", in_dim=backbone.embed_dim))).to(device)
    loss: DINOLoss = build(config, "loss").to(device)
    step, steps_per_epoch = 0, epoch_length(loader, options)
    if state is not None:
        model.load_state_dict(state["model"])
        loss.load_state_dict(state["loss"])
        step, steps_per_epoch = state["step"], state["steps_per_epoch"]
    schedule = build(config, "schedule.teacher_temp", epochs=options.epochs, steps_per_epoch=steps_per_epoch)
    epoch, position = divmod(step, steps_per_epoch)
    with torch.no_grad():
        batch = next(iter(loader.epoch(epoch, first_batch=position * options.accumulate_steps))).to(device)
        views = augmentation.photometric(batch)
    return Subject(origin, step, steps_per_epoch, schedule(step), model, loss, views)
