"""Where a run starts from."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dino import ranks
from dino.config import differences, raw_settings, referenced_keys
from dino.messages import did_you_mean
from dino.presets import leaves
from dino.training import checkpoint
from dino.training.state import restore
from dino.training.trainer import Trainer

log = logging.getLogger("dino")


def resume_or_start(trainer: Trainer, config: DictConfig) -> None:
    """Puts the trainer where the run starts; the places are tried in this order.

    1. `resume=PATH`: that checkpoint, of any run.
    2. `resume=auto`: the newest valid checkpoint in the run directory.
    3. Otherwise step 0, from `backbone.weights` where given (loaded when the backbone was built).

    Raises:
        ValueError: for `resume=never` in a run directory that has checkpoints, and for a checkpoint that was made with
            other settings that change results, unless `resume_changes` names them.
    """
    newest = ranks.from_main(trainer.checkpoints.newest_valid() if ranks.rank() == 0 else None)
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
    _refuse_changes(path, state["settings"], trainer.settings, config)
    _fit_to_batch(trainer, state, path)
    restore(trainer, state)
    log.info("resume      %s, step %d", path, trainer.step)


def _refuse_changes(path: Path, old: dict[str, Any], new: dict[str, Any], config: DictConfig) -> None:
    """What differs must have been asked for: by its own name, or by that of a key or group that it follows from."""
    asked = list(config.resume_changes)
    known = {*old, *new} | {key.rpartition(".")[0] for key in (*old, *new)}
    for name in asked:
        if name not in known:
            raise ValueError(f"resume_changes: {name} is no setting that changes results{did_you_mean(name, known)}")
    changed = {line.partition(":")[0]: line for line in differences(old, new)}
    refused = {key: line for key, line in changed.items() if not _follows(key, asked, config)}
    if refused:
        causes = [key for key in refused if not _follows(key, [other for other in refused if other != key], config)]
        raise ValueError(
            f"resume={path}: the checkpoint was made with other settings: {'; '.join(refused.values())}; "
            f"use those, or change them on purpose with resume_changes=[{','.join(causes)}]"
        )
    for line in changed.values():
        log.warning("changed     %s", line)


def _follows(key: str, causes: Iterable[str], config: DictConfig) -> bool:
    """Whether `key` is one of `causes`, lies below one, or takes its value from one."""
    raw = leaves(raw_settings(config))
    waiting, seen = [key], set()
    while waiting:
        current = waiting.pop()
        if any(current == cause or current.startswith(f"{cause}.") for cause in causes):
            return True
        seen.add(current)
        waiting += [read for read in referenced_keys(raw.get(current)) if read not in seen]
    return False


def _fit_to_batch(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    """With other images a step, a step means something else: the position in the data is kept, and steps count anew.

    Raises:
        ValueError: in the directory of the run itself, whose files count the old steps.
    """
    before, after = state["images_per_step"], trainer.images_per_step
    if (before, state["steps_per_epoch"]) == (after, trainer.steps_per_epoch):
        return
    if (trainer.run.directory / "metrics.jsonl").exists():
        raise ValueError(
            f"run_dir={trainer.run.directory}: its files count steps of {before} images, {state['steps_per_epoch']} an "
            f"epoch, now there would be {after} images and {trainer.steps_per_epoch} steps; give another run_dir with "
            f"resume={path}"
        )
    epoch, position = divmod(state["step"], state["steps_per_epoch"])
    step = epoch * trainer.steps_per_epoch + min(position * before // after, trainer.steps_per_epoch - 1)
    log.warning("changed     step %d of %d images is step %d of %d images", state["step"], before, step, after)
    state["evaluated_step"] = step if state["evaluated_step"] == state["step"] else None
    state["step"] = step
