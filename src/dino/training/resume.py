"""Where a run starts from."""

import logging
from pathlib import Path

from omegaconf import DictConfig

from dino.config import differences, result_settings
from dino.training import checkpoint
from dino.training.trainer import Trainer

log = logging.getLogger("dino")


def resume_or_start(trainer: Trainer, config: DictConfig) -> None:
    """Puts the trainer where the run starts; the places are tried in this order.

    1. `resume=PATH`: that checkpoint, of any run.
    2. `resume=auto`: the newest valid checkpoint in the run directory.
    3. Otherwise step 0, from `backbone.weights` where given (loaded when the backbone was built).

    Raises:
        ValueError: for `resume=never` in a run directory that has checkpoints, and for a checkpoint that was made with
            other settings that change results.
    """
    newest = trainer.checkpoints.newest_valid()
    if config.resume == "never":
        if newest is not None:
            raise ValueError(
                f"resume=never: {trainer.run.directory} already has {newest.name}, which would be overwritten; "
                "use resume=auto to continue it, or another run_dir"
            )
        return
    path = newest if config.resume == "auto" else Path(config.resume)
    if path is None:
        return
    state = checkpoint.load(path)
    changed = differences(state["settings"], result_settings(config))
    if changed:
        raise ValueError(f"resume={path}: the checkpoint was made with other settings: {'; '.join(changed)}")
    trainer.load_state_dict(state)
    log.info("resume      %s, step %d", path, trainer.step)
