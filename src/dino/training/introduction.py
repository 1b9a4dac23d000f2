"""The few lines printed before training: what will run, on what, and what follows from the settings."""

import logging
import math

import torch
from omegaconf import DictConfig, OmegaConf

from dino import ranks
from dino.augmentation import MultiCrop
from dino.optimizer import half_life_steps
from dino.runtime import device_name
from dino.training.trainer import Trainer

log = logging.getLogger("dino")


def introduce(trainer: Trainer, config: DictConfig) -> None:
    """Prints device, data, views, network, learning rate, teacher half-life, length, place; then what was derived."""
    step, options = trainer.train_step, trainer.options
    student, schedules = step.model.student, step.schedules
    reference = options.lr_reference_batch
    lr = config.optimizer.lr
    scaling = f" x {trainer.images_per_step} / {reference}" if reference else ", not scaled"
    lines = {
        "device": f"{device_name(trainer.device)}, precision {step.precision.name}",
        "dataset": f"{trainer.dataset.name}: {_splits(trainer)}",
        "views": _views(trainer.augmentation),
        "backbone": f"{type(student.backbone).__name__}, {num_parameters(student.backbone)} parameters, "
        f"{student.backbone.embed_dim} features; head {num_parameters(student.head)} parameters",
        "batch": f"{trainer.images_per_step} images a step "
        f"({_factors(trainer)}); "
        f"peak lr {schedules.lr.base:.3g} = {lr:.3g}{scaling}",
        "teacher": f"momentum {schedules.teacher_momentum(0):g}: half of it is older than "
        f"{half_life(schedules.teacher_momentum(0), trainer)}",
        "length": f"{trainer.total_steps} steps, {trainer.steps_per_epoch} an epoch; "
        f"the schedules span {options.epochs} epochs",
        "moves": _expected_moves(trainer),
        "run": str(trainer.run.directory),
    }
    for name, text in lines.items():
        log.info("%-11s %s", name, text)
    for notice in [*fitted_sizes(config), *trainer.augmentation.notices]:
        log.info("%-11s %s", "note", notice)


def _expected_moves(trainer: Trainer) -> str:
    moves = trainer.health.moves
    if not moves:
        return "at no step is the loss expected to jump"
    causes = (f"{step} ({move.cause.replace('_', ' ')})" for step, found in moves.items() for move in found)
    return f"the loss is expected to move at step {', '.join(causes)}"


def _factors(trainer: Trainer) -> str:
    words = f"{trainer.loader.batch_size} x {trainer.options.accumulate_steps}"
    return f"{words} on each of {ranks.world_size()} ranks" if ranks.world_size() > 1 else words


def fitted_sizes(config: DictConfig) -> list[str]:
    """One line for the view sizes that come from the dataset and were fitted to the patch of the backbone."""
    fitted = [
        f"{name} {config.dataset[name]} -> {config.augmentation[name]} px"
        for name in ("global_size", "local_size")
        if OmegaConf.is_interpolation(config.augmentation, name) and config.dataset[name] != config.augmentation[name]
    ]
    if not fitted:
        return []
    patch = config.backbone.patch_size
    return [f"view sizes of the dataset fitted to patches of {patch} px: {', '.join(fitted)}"]


def half_life(momentum: float, trainer: Trainer) -> str:
    """After how many steps, samples and epochs half of the teacher has been replaced, at a constant momentum."""
    steps = half_life_steps(momentum)
    if math.isinf(steps):
        return "the run (a momentum of 1 never changes the teacher)"
    if steps == 0:
        return "one step (a momentum of 0 copies the student)"
    samples, epochs = steps * trainer.images_per_step, steps / trainer.steps_per_epoch
    return f"{steps:.0f} steps = {samples:,.0f} samples = {epochs:.2g} epochs"


def num_parameters(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"


def _splits(trainer: Trainer) -> str:
    parts = [f"{len(trainer.dataset.train()):,} training images"]
    evaluation = trainer.dataset.evaluation()
    parts.append(f"{len(evaluation[1]):,} held out" if evaluation else "none held out")
    classes = trainer.dataset.num_classes
    parts.append(f"{classes} classes" if classes else "no labels")
    return ", ".join(parts)


def _views(augmentation: MultiCrop) -> str:
    views = f"2 global of {augmentation.global_size} px"
    if augmentation.num_local_views:
        views += f" + {augmentation.num_local_views} local of {augmentation.local_size} px"
    return f"{views}, photometric part on the {augmentation.photometric_device}"
