"""What the schedules of a run hold for all of its steps, from its settings."""

import numpy as np
from omegaconf import OmegaConf

from dino.analysis.history import History, Series
from dino.config import build
from dino.schedule import scaled_lr

NUM_POINTS = 100
NOTHING = Series(np.array([]), np.array([]))


def planned(history: History, name: str) -> Series:
    """The schedule `name` (such as `lr`) over the whole run; empty where the run's files do not tell."""
    trainer = history.config.get("trainer") or {}
    images = _images_a_step(history)
    if history.steps_per_epoch is None or images is None or name not in (history.config.get("schedule") or {}):
        return NOTHING
    try:
        values = {"epochs": trainer["epochs"], "steps_per_epoch": history.steps_per_epoch}
        reference = trainer["lr_reference_batch"]
        if name == "lr" and reference is not None:
            values["base"] = scaled_lr(history.config["optimizer"]["lr"], images, reference)
        node = history.config["schedule"][name]
        if not str(node["_target_"]).startswith("dino.schedule."):  # the file may come from anywhere
            return NOTHING
        config = OmegaConf.create({**history.config, "allowed_targets": []})
        schedule = build(config, f"schedule.{name}", **values)
    except (ValueError, TypeError, KeyError, AssertionError):  # of an older run, or damaged
        return NOTHING
    steps = np.unique(np.linspace(1, schedule.total_steps, NUM_POINTS).round())
    return Series(steps, np.array([schedule(int(step) - 1) for step in steps]))


def _images_a_step(history: History) -> int | None:
    """The effective batch, which depends on the number of ranks; from what was logged."""
    speed, time = history.series("perf/images_per_s").finite, history.series("perf/step_time_s").finite
    return round(float(speed.values[0] * time.values[0])) if len(speed) and len(time) else None
