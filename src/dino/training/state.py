"""What a checkpoint holds: everything that a run needs to go on as if nothing had happened."""

import logging
from typing import TYPE_CHECKING, Any

import torch

from dino import ranks
from dino.runtime import rng_state, set_rng_state, set_seeds
from dino.training import checkpoint

if TYPE_CHECKING:
    from dino.training.trainer import Trainer

log = logging.getLogger("dino")


def state_of(trainer: "Trainer") -> dict[str, Any]:
    """Tensors and plain types only. Every rank must call it, between two steps."""
    algorithm = trainer.train_step
    return {
        "step": trainer.step,
        "evaluated_step": trainer.evaluated_step,
        "model": algorithm.model.state_dict(),
        "loss": algorithm.loss.state_dict(),
        "optimizer": algorithm.optimizer.state_dict(),
        "scaler": algorithm.scaler.state_dict(),
        "rng": ranks.gather_objects(rng_state()),  # one of each rank: their drop paths differ
        "epoch_loss": ranks.gather_objects(trainer.epoch_loss.tolist()),
        "loader": trainer.loader.state_dict(),
        "non_finite": trainer.non_finite.state_dict(),
        "health": trainer.health.state_dict(),
        "early_stopping": trainer.early_stopping.state_dict(),
        "loggers": {type(logger).__name__: logger.state_dict() for logger in trainer.loggers},
        "latest": dict(trainer.latest),
        "train_time_s": trainer.clock.seconds,
        "steps_per_epoch": trainer.steps_per_epoch,
        "images_per_step": trainer.images_per_step,
        "origin": trainer.origin,
        "normalization": dict(zip(("mean", "std"), trainer.dataset.normalization(), strict=True)),  # for later users
        "settings": trainer.settings,
        "provenance": trainer.run.provenance,
    }


def restore(trainer: "Trainer", state: dict[str, Any]) -> None:
    """Continues from `state`, strictly: a part that is missing or does not fit is an error."""
    algorithm = trainer.train_step
    algorithm.model.load_state_dict(state["model"])
    algorithm.loss.load_state_dict(state["loss"])
    algorithm.optimizer.load_state_dict(state["optimizer"])
    algorithm.scaler.load_state_dict(state["scaler"])
    trainer.loader.load_state_dict(state["loader"])
    trainer.non_finite.load_state_dict(state["non_finite"])
    trainer.health.load_state_dict(state["health"])
    trainer.early_stopping.load_state_dict(state["early_stopping"])
    for logger in trainer.loggers:
        if type(logger).__name__ in state["loggers"]:
            logger.load_state_dict(state["loggers"][type(logger).__name__])
    _restore_ranks(trainer, state)
    trainer.step = state["step"]
    trainer.evaluated_step = state["evaluated_step"]
    trainer.latest = dict(state["latest"])
    trainer.clock.resume_from(state["train_time_s"])


def restore_best(trainer: "Trainer") -> None:
    """The networks of the best evaluation take the place of the last ones; the newest checkpoint stays as it is."""
    checkpoints, best_step = trainer.checkpoints, trainer.early_stopping.best_step
    path = ranks.from_main(checkpoints.best() if ranks.rank() == 0 else None)
    if path is None or best_step is None:
        return
    state = checkpoint.load(path)
    if state["step"] != best_step:
        log.warning("the best, step %d, could not be saved", best_step)
        return
    trainer.train_step.model.load_state_dict(state["model"])
    trainer.train_step.loss.load_state_dict(state["loss"])
    if ranks.rank() == 0:
        checkpoints.point_last_to_best()
    log.info("restored    student, teacher and center of step %d, the best; last.pt is best.pt", best_step)


def _restore_ranks(trainer: "Trainer", state: dict[str, Any]) -> None:
    """What differs between ranks. With another number of them, which somebody has asked for, it cannot be the same:
    the random streams start anew, and the first rank takes over the sums of all."""
    rank = ranks.rank()
    epoch_loss = torch.tensor(state["epoch_loss"], dtype=torch.float64)  # [ranks, 2]
    if len(state["rng"]) == ranks.world_size():
        set_rng_state(state["rng"][rank])
        trainer.epoch_loss.copy_(epoch_loss[rank])
    else:
        set_seeds(trainer.seed + state["step"], rank)
        trainer.epoch_loss.copy_(epoch_loss.sum(dim=0) if rank == 0 else torch.zeros(2))
