"""`dino tune batch`: the largest batch that fits into memory, found by real runs of a few steps.

Every trial is a process of its own that starts, trains and saves as a run does, so what it needed is what a run needs:
nothing of one trial is left in the next, and an out-of-memory ends nothing but the trial.
"""

import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import linear_regression

import psutil
import torch
from omegaconf import DictConfig, open_dict
from rich.table import Column, Table
from torch.nn.modules.batchnorm import _BatchNorm

from dino.config import CONF, build, save_config
from dino.logger.json_lines import read_lines
from dino.messages import ConfigError
from dino.rules import rule_for
from dino.run import read_status
from dino.runtime import choose_device
from dino.validation import checked

NUM_STEPS = 4  # of a trial; speed is that of all but the first
FIRST_MULTIPLES = (1, 2)  # of `multiple`: what the first line is drawn through
MAX_GROWTH = 8  # a batch is at most so many times the largest that has been measured
MAX_TRIALS = 10
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Trial:
    """What a batch size takes; without figures where memory ran out."""

    batch_size: int
    peak_gib: float | None = None
    images_per_s: float | None = None
    memory: str | None = None  # trainer.memory

    def fits(self, budget_gib: float) -> bool:
        return self.peak_gib is not None and self.peak_gib <= budget_gib


Measure = Callable[[int], Trial]


@dataclass(frozen=True)
class Found:
    """All trials of one search, and what it was for."""

    trials: Sequence[Trial]
    others: Sequence[Trial]  # one of the batch sizes with the other values of trainer.memory
    budget_gib: float
    effective_batch: int
    accumulates: bool  # a step may be made of micro-batches with these settings
    batch_norm: bool = False  # which sees one micro-batch at a time: other sizes are other statistics

    @property
    def largest(self) -> int | None:
        """The largest batch size that fits; None where none does."""
        return max((trial.batch_size for trial in self.trials if trial.fits(self.budget_gib)), default=None)

    def table(self) -> Table:
        columns = ("trainer.memory", "batch", "peak GiB", "images/s", f"{self.budget_gib:.2f} GiB")
        table = Table(*(Column(name, justify="right") for name in columns))
        for trial in [*self.trials, *self.others]:
            peak = "-" if trial.peak_gib is None else f"{trial.peak_gib:.2f}"
            speed = "-" if trial.images_per_s is None else f"{trial.images_per_s:.1f}"
            verdict = (
                "out of memory" if trial.peak_gib is None else "fits" if trial.fits(self.budget_gib) else "too large"
            )
            table.add_row(trial.memory or "-", str(trial.batch_size), peak, speed, verdict)
        return table

    def advice(self) -> list[str]:
        """The overrides to use."""
        if self.largest is None:
            return [
                "no batch fits: turn down augmentation.num_local_views, head.out_dim or the backbone, or trainer.memory"
            ]
        lines = [f"largest     dataset.batch_size={self.largest}"]
        batch_size, steps = keeping_effective_batch(self.effective_batch, self.largest)
        if steps == 1 or self.accumulates:
            settings = f"dataset.batch_size={batch_size} trainer.accumulate_steps={steps}"
            remark = f"of which batch norm sees {batch_size} at a time" if self.batch_norm else "as configured"
            return [*lines, f"advice      {settings}: steps of {self.effective_batch} images, {remark}"]
        return [*lines, f"note        steps of {self.effective_batch} images do not fit, and cannot be made of parts"]


def tune_batch(
    config: DictConfig,
    overrides: Sequence[str],
    *,
    memory_gib: float | None,
    headroom: float,
    multiple: int,
    max_batch: int,
    say: Callable[[Trial], None],
) -> Found:
    """Searches for the largest batch, then measures the other values of `trainer.memory` at a batch of half the size.

    Args:
        config: checked.
        overrides: that it was made of.
        memory_gib: the budget [GiB]; None: what is free now, less the share `headroom`.
        multiple: batch sizes are multiples of this.
        max_batch: no larger one is tried.
        say: is told of every trial as it ends.

    Raises:
        ValueError: for data that cannot be read, and for runs that fail other than by running out of memory.
    """
    num_images = len(build(config, "dataset").train())
    effective = config.dataset.batch_size * config.trainer.accumulate_steps
    accumulates, batch_norm = _accepted([*overrides, "trainer.accumulate_steps=2"]), has_batch_norm(config)
    limit = min(max_batch, num_images)
    if limit < multiple:
        raise ValueError(f"--multiple={multiple}: a batch has at most {limit} images here; use {limit} or less")
    budget = available_gib(choose_device(config.trainer.device)) * (1 - headroom) if memory_gib is None else memory_gib

    def measure(batch_size: int, memory: str | None = None) -> Trial:
        # Gradients that wait for another micro-batch take memory too.
        several = accumulates and batch_size < effective and 2 * batch_size <= num_images
        trial = run_trial(config, batch_size, 2 if several else 1, memory)
        say(trial)
        return trial

    trials = find_largest(measure, budget, multiple=multiple, limit=limit)
    rule = rule_for("trainer.memory")
    choices = [choice for choice in rule.choices if choice != config.trainer.memory] if rule else []
    sizes = [trial.batch_size for trial in trials if trial.fits(budget)]
    halves = [size for size in sizes if 2 * size <= sizes[-1]] or sizes[:1]
    others = [measure(halves[-1], choice) for choice in choices] if halves else []
    return Found(trials, others, budget, effective, accumulates, batch_norm)


def _accepted(overrides: Sequence[str]) -> bool:
    try:
        checked(overrides)
    except ConfigError:
        return False
    return True


def has_batch_norm(config: DictConfig) -> bool:
    backbone = build(config, "backbone")
    head = build(config, "head", in_dim=backbone.embed_dim)
    return any(isinstance(part, _BatchNorm) for network in (backbone, head) for part in network.modules())


# ---------------------------------------------------------------------- the search


def find_largest(measure: Measure, budget_gib: float, *, multiple: int, limit: int) -> list[Trial]:
    """Trials by batch size, among them the largest multiple of `multiple`, up to `limit`, that fits the budget.

    Memory is linear in the batch, apart from what does not depend on it: each next trial is where the line through
    those before meets the budget. Where memory has run out there is no figure, and the next lies halfway.
    """
    trials: dict[int, Trial] = {}
    largest_possible = limit // multiple * multiple
    for factor in FIRST_MULTIPLES:
        if factor * multiple <= largest_possible:
            trials[factor * multiple] = measure(factor * multiple)
    while len(trials) < MAX_TRIALS:
        batch_size = _next_size(list(trials.values()), budget_gib, multiple, largest_possible)
        if batch_size in trials or batch_size < multiple:
            break
        trials[batch_size] = measure(batch_size)
    return [trials[batch_size] for batch_size in sorted(trials)]


def _next_size(trials: list[Trial], budget_gib: float, multiple: int, largest_possible: int) -> int:
    fitting = [trial.batch_size for trial in trials if trial.fits(budget_gib)]
    too_large = [trial.batch_size for trial in trials if not trial.fits(budget_gib)]
    lowest = max(fitting, default=0)
    highest = min([largest_possible, MAX_GROWTH * max(fitting, default=multiple), *(n - multiple for n in too_large)])
    points = [(trial.batch_size, trial.peak_gib) for trial in trials if trial.peak_gib is not None]
    if len(points) < 2:
        return (lowest + highest) // 2 // multiple * multiple
    slope, constant = linear_regression(*zip(*points, strict=True))
    predicted = int((budget_gib - constant) / slope) if slope > 0 else highest
    if too_large and predicted > highest:  # where it ran out, it took more than the line says
        predicted = (lowest + highest + multiple) // 2
    return max(lowest, min(predicted, highest)) // multiple * multiple


def keeping_effective_batch(effective: int, largest: int) -> tuple[int, int]:
    """Batch size and micro-batches whose product is `effective`, with the largest batch that fits."""
    batch_size = max(size for size in range(1, min(effective, largest) + 1) if effective % size == 0)
    return batch_size, effective // batch_size


# ---------------------------------------------------------------------- one trial


def run_trial(config: DictConfig, batch_size: int, accumulate_steps: int = 1, memory: str | None = None) -> Trial:
    """Trains a few steps of `config` with other batches, in a process and a directory of its own.

    Raises:
        ValueError: the run ended in another way than by running out of memory.
    """
    trial = Trial(batch_size, memory=memory or config.trainer.get("memory"))
    with tempfile.TemporaryDirectory(prefix="dino_tune_") as directory:
        run_dir = Path(directory)
        short = _short(config, run_dir)
        short.dataset.batch_size, short.trainer.accumulate_steps = batch_size, accumulate_steps
        if memory is not None:
            short.trainer.memory = memory
        command = [sys.executable, str(CONF.parent / "train.py"), "--frozen", str(save_config(short, run_dir))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        reason = str(read_status(run_dir).get("reason") or done.stderr.strip() or "it ended without a word")
        if done.returncode == 0:
            *_, last = (line for line in read_lines(run_dir / "metrics.jsonl") if "perf/images_per_s" in line)
            peak = max(last["perf/peak_memory_gib"], last.get("perf/memory_reserved_gib", 0.0))
            return replace(trial, peak_gib=peak, images_per_s=last["perf/images_per_s"])
        if done.returncode == -signal.SIGKILL or OUT_OF_MEMORY in reason:  # the system kills what takes too much
            return trial
    raise ValueError(f"dataset.batch_size={batch_size}: the trial failed: {reason.splitlines()[-1]}")


def _short(config: DictConfig, run_dir: Path) -> DictConfig:
    """A run of some steps, without evaluations, reports and trackers, that trains all parameters and saves."""
    short = config.copy()
    with open_dict(short):
        short.pop("hydra", None)
        short.run_dir, short.resume = str(run_dir), "never"
        short.evaluation, short.logger = {}, {"jsonl": config.logger.jsonl}
        short.monitor.report, short.monitor.every_steps = False, NUM_STEPS
        short.monitor.early_stopping.metric = None
        short.trainer.max_steps = NUM_STEPS
        short.trainer.save_every_steps = NUM_STEPS // 2  # the peak is read after the last step, before it is saved
        short.trainer.freeze_last_layer_epochs = 0  # frozen, the prototypes have no state in the optimizer
    return short


def available_gib(device: torch.device) -> float:
    """Free memory [GiB]: of the GPU, or of the machine, within what a job's control group leaves of it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    available: int = psutil.virtual_memory().available
    with suppress(FileNotFoundError):  # no control group
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        if limit != "max":
            available = min(available, int(limit) - int(used))
    return available / 2**30
