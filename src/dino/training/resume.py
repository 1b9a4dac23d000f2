"""Where a run starts from."""

import logging
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dino import ranks
from dino.config import differences, raw_settings, referenced_keys
from dino.messages import did_you_mean, show
from dino.presets import leaves
from dino.run import read_status
from dino.training import checkpoint
from dino.training.state import restore
from dino.training.trainer import Trainer

log = logging.getLogger("dino")

# What a run did whose checkpoint knows nothing of the key: it goes on as it was.
BEFORE_IT_WAS_A_KEY: dict[str, Any] = {
    "trainer.freeze_backbone_steps": 0,
    "evaluation.knn.half_precision": False,
    **{f"evaluation.{name}.prefix": "val" for name in ("knn", "label_free", "validation_loss")},
}


def resume_or_start(trainer: Trainer, config: DictConfig) -> None:
    """Puts the trainer where the run starts.

    - `resume=auto`: the newest valid checkpoint in the run directory; where there never was one, step 0, from
      `backbone.weights` where given (loaded when the backbone was built).
    - `resume=PATH`: that checkpoint. The same command given again (by hand, or by a scheduler) goes on from the newest
      checkpoint that has come of it. A PATH in the run directory itself goes back: newer checkpoints are set aside.
    - `resume=never`: step 0.

    Raises:
        ValueError: for `resume=never` or a PATH from elsewhere in a run directory that has checkpoints of its own, for
            checkpoints none of which is valid, or all of which are gone, for one that was made with other settings
            that change results, unless `resume_changes` names them, and for one beyond the end of the run.
    """
    newest = _newest(trainer, needed=config.resume in ("auto", "never"))
    if config.resume == "never":
        if newest is not None:
            raise ValueError(
                f"resume=never: {trainer.run.directory} already has {newest.name}, which would be overwritten; "
                "use resume=auto to continue it, or another run_dir"
            )
        return
    if config.resume == "auto" and newest is None:
        _refuse_to_lose(trainer)
    path = newest if config.resume == "auto" else _path_or_what_came_of_it(trainer, Path(config.resume), newest)
    if path is None:
        return
    state = checkpoint.load(path)
    _refuse_changes(trainer, path, state, config)
    _fit_to_batch(trainer, state)
    restore(trainer, state)
    if config.resume == "auto" or path == newest:
        trainer.origin = state["origin"]
    else:
        trainer.origin = str(path.resolve())
    if path.resolve().parent == trainer.checkpoints.directory.resolve():
        trainer.checkpoints.saved_step = trainer.step
    if trainer.step > trainer.total_steps:
        key = "max_steps" if trainer.options.max_steps == trainer.total_steps else "epochs"
        raise ValueError(
            f"trainer.{key}={getattr(trainer.options, key)}: that is step {trainer.total_steps}, and {path} is of step "
            f"{trainer.step} already; give more, or another run_dir"
        )
    log.info("resume      %s, step %d", path, trainer.step)
    if trainer.finished:
        log.info("note        nothing is left to train: the run has %d steps", trainer.total_steps)


def _newest(trainer: Trainer, *, needed: bool) -> Path | None:
    """What rank 0 finds, on every rank; where all are damaged, that is an error only if one is `needed`."""
    found: Path | ValueError | None = None
    if ranks.rank() == 0:
        try:
            found = trainer.checkpoints.newest_valid()
        except ValueError as error:
            remedy = f"give resume=PATH of a good one, or remove {trainer.checkpoints.directory} and use resume=never"
            found = ValueError(f"run_dir={error}; {remedy}")
    found = ranks.from_main(found)
    if isinstance(found, ValueError):
        if needed:
            raise found
        return None
    return found


def _refuse_to_lose(trainer: Trainer) -> None:
    """A run that has saved does not start anew because somebody has removed what it saved."""
    saved = ranks.from_main(read_status(trainer.run.directory).get("saved_step"))
    if saved is not None:
        raise ValueError(
            f"run_dir={trainer.run.directory}: it had a checkpoint of step {saved}, and now has none; put one back, "
            "give resume=PATH of another, or resume=never to start anew"
        )


def _path_or_what_came_of_it(trainer: Trainer, path: Path, newest: Path | None) -> Path:
    if newest is None or newest.samefile(path):
        return path
    if checkpoint.load(newest)["origin"] == str(path.resolve()):
        log.info("note        resume=%s is where this run began; it goes on from its newest checkpoint", path)
        return newest
    if path.resolve().parent != trainer.checkpoints.directory.resolve():
        raise ValueError(
            f"resume={path}: {trainer.run.directory} has checkpoints of its own, which did not come of it "
            f"({newest.name}); use another run_dir, or resume=auto"
        )
    return path


def _refuse_changes(trainer: Trainer, path: Path, state: Mapping[str, Any], config: DictConfig) -> None:
    """What differs must have been asked for: by its own name, or by that of a key or group that it follows from."""
    new = trainer.settings
    old = {key: value for key, value in BEFORE_IT_WAS_A_KEY.items() if key in new} | state["settings"]
    asked = list(config.resume_changes)
    known = {*old, *new} | {key.rpartition(".")[0] for key in (*old, *new)}
    for name in asked:
        if name not in known:
            raise ValueError(f"resume_changes: {name} is no setting that changes results{did_you_mean(name, known)}")
    changed = {line.partition(":")[0]: line for line in differences(old, new)}
    refused = {key: line for key, line in changed.items() if not _follows(key, asked, config)}
    needs_directory = _steps_differ(trainer, state) and (trainer.run.directory / "metrics.jsonl").exists()
    if refused or needs_directory:
        causes = [key for key in changed if not _follows(key, [other for other in changed if other != key], config)]
        advice = ["change them on purpose with", shlex.quote(f"resume_changes={show(causes)}")] if refused else []
        if needs_directory:
            advice += ["and"] if refused else ["go on"]
            advice += [f"in another run_dir with resume={path}, since the files here count steps of other images"]
        raise ValueError(
            f"resume={path}: the checkpoint was made with other settings: {'; '.join(changed.values())}; "
            f"use those, or {' '.join(advice)}"
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


def _steps_differ(trainer: Trainer, state: Mapping[str, Any]) -> bool:
    """Whether a step is one of other images than before, so that its number means something else."""
    before = (state["images_per_step"], state["steps_per_epoch"])
    return before != (trainer.images_per_step, trainer.steps_per_epoch)


def _fit_to_batch(trainer: Trainer, state: dict[str, Any]) -> None:
    """With other images a step, the position in the data is kept, and steps count anew."""
    if not _steps_differ(trainer, state):
        return
    before, after = state["images_per_step"], trainer.images_per_step
    epoch, position = divmod(state["step"], state["steps_per_epoch"])
    step = epoch * trainer.steps_per_epoch + min(position * before // after, trainer.steps_per_epoch - 1)
    log.warning("changed     step %d of %d images is step %d of %d images", state["step"], before, step, after)
    state["evaluated_step"] = step if state["evaluated_step"] == state["step"] else None
    state["step"] = step
