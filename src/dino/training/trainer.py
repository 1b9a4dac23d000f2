"""The training loop: `fit` reads top to bottom; the algorithm itself is in `step.py`.

`step` counts finished optimizer steps, here and in every file that a run leaves: step 0 is the untrained network.
"""

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dino.augmentation import MultiCrop, ViewBatch
from dino.dataset import ImageDataset, TrainLoader
from dino.evaluation import EvaluationInputs, Evaluator
from dino.logger import Logger, RunContext
from dino.monitor import Statistics
from dino.run import Run
from dino.runtime import peak_memory_gib, rng_state, set_rng_state
from dino.training.checkpoint import CheckpointStore
from dino.training.clock import TrainingClock
from dino.training.options import TrainerOptions
from dino.training.step import StepOutput, TrainStep

log = logging.getLogger("dino")


@dataclass(kw_only=True)
class Trainer:
    """Trains a student against its EMA teacher; everything it needs is handed in.

    `fit` runs from `step` to the end; `state_dict` holds all that a resumed run needs to go on as if nothing had
    happened. `settings` are the plain settings that change results; they travel with the checkpoints.
    """

    options: TrainerOptions
    train_step: TrainStep
    dataset: ImageDataset
    loader: TrainLoader
    augmentation: MultiCrop
    statistics: Statistics
    evaluators: Sequence[Evaluator]
    loggers: Sequence[Logger]
    run: Run
    seed: int
    settings: dict[str, Any]
    steps_per_epoch: int
    step: int = 0
    best_score: float | None = None
    latest: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = self.train_step.precision.device
        self.images_per_step = self.loader.batch_size * self.options.accumulate_steps
        self.total_steps = self.options.epochs * self.steps_per_epoch
        if self.options.max_steps is not None:
            self.total_steps = min(self.total_steps, self.options.max_steps)
        self.checkpoints = CheckpointStore(self.run.directory / "checkpoints", self.options.keep_checkpoints)
        self.clock = TrainingClock()
        self._last_logged_step = 0

    # ------------------------------------------------------------------ the loop

    def fit(self) -> None:
        try:
            self._start()
            while self.step < self.total_steps:
                for window in self._rest_of_epoch():
                    output = self.train_step(self.step, window)
                    self.step += 1
                    self._after_step(output)
                    if self.step == self.total_steps:
                        break
        finally:
            self._close()

    def _rest_of_epoch(self) -> Iterator[list[ViewBatch]]:
        """From the current step on: windows of `accumulate_steps` micro-batches, as float views on the device."""
        epoch, position = divmod(self.step, self.steps_per_epoch)
        count = self.options.accumulate_steps
        batches = self.loader.epoch(epoch, first_batch=position * count)
        for _ in range(position, self.steps_per_epoch):
            yield [self._to_device(batch) for batch in itertools.islice(batches, count)]

    def _to_device(self, batch: ViewBatch) -> ViewBatch:
        batch = batch.to(self.device, non_blocking=True)
        return self.augmentation.photometric(batch) if batch.parameters is not None else batch

    def _after_step(self, output: StepOutput) -> None:
        epoch, position = divmod(self.step, self.steps_per_epoch)
        finished = self.step == self.total_steps
        for logger in self.loggers:
            logger.advance(self.step)
        if self.statistics.due(self.step - 1) or finished:
            self._log_statistics(output)
        with self.clock.paused():
            improved = (position == 0 or finished) and self._evaluate(epoch)
            if improved or finished or self._save_is_due(epoch, position):
                self.save(best=improved)

    # ------------------------------------------------------------------ start, log, evaluate, save, close

    def _start(self) -> None:
        self._last_logged_step = self.step
        context = RunContext(self.run.directory, self.step, self.total_steps, self.steps_per_epoch)
        for logger in self.loggers:
            logger.start(context)
        if self.step == 0:
            self._evaluate(epoch=0)
        self.clock.start()

    def _log_statistics(self, output: StepOutput) -> None:
        seconds, steps = self.clock.lap(), self.step - self._last_logged_step
        self._last_logged_step = self.step
        metrics = self.statistics.compute(output, self.train_step.loss)
        metrics |= {f"train/{name}": value for name, value in output.scheduled.items()}
        metrics["perf/step_time_s"] = seconds / steps
        metrics["perf/images_per_s"] = steps * self.images_per_step / seconds
        metrics["perf/peak_memory_gib"] = peak_memory_gib(self.device)
        self._log(metrics)
        self.run.update(step=self.step)

    def _log(self, metrics: dict[str, float]) -> None:
        self.latest |= metrics
        for logger in self.loggers:
            logger.log(self.step, metrics)

    def _evaluate(self, epoch: int) -> bool:
        """Runs the evaluators that are due; True if the score (k-NN, else validation loss) is the best so far."""
        started = time.perf_counter()
        finished = self.step == self.total_steps
        inputs = EvaluationInputs(
            model=self.train_step.model,
            dataset=self.dataset,
            augmentation=self.augmentation,
            loss=self.train_step.loss,
            device=self.device,
            autocast=self.train_step.precision.autocast,
            seed=self.seed,
            teacher_temp=self.train_step.schedules.teacher_temp(self.step),
            limit_samples=self.options.limit_evaluation_samples,
            untrained=self.step == 0,
        )
        metrics: dict[str, float] = {}
        for evaluator in self.evaluators:
            if finished or epoch % evaluator.every_epochs == 0:
                metrics |= evaluator.evaluate(inputs)
        if not metrics:
            return False
        self._log(metrics | {"perf/evaluation_s": time.perf_counter() - started})
        score = metrics.get("val/knn_top1", -metrics.get("val/loss", float("inf")))
        if self.step == 0 or (self.best_score is not None and score <= self.best_score):
            return False
        self.best_score = score
        return True

    def _save_is_due(self, epoch: int, position: int) -> bool:
        steps, epochs = self.options.save_every_steps, self.options.save_every_epochs
        by_step = steps is not None and self.step % steps == 0
        return by_step or (epochs is not None and position == 0 and epoch % epochs == 0)

    def save(self, *, best: bool = False) -> Path:
        return self.checkpoints.save(self.step, self.state_dict(), self.latest, best=best)

    def _close(self) -> None:
        """Also after an exception: a progress bar gives the terminal back, `status.json` names the last step."""
        for logger in self.loggers:
            logger.close()
        self.run.update(step=self.step)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        algorithm = self.train_step
        return {
            "step": self.step,
            "model": algorithm.model.state_dict(),
            "loss": algorithm.loss.state_dict(),
            "optimizer": algorithm.optimizer.state_dict(),
            "scaler": algorithm.scaler.state_dict(),
            "rng": rng_state(),
            "loader": self.loader.state_dict(),
            "best_score": self.best_score,
            "latest": self.latest,
            "train_time_s": self.clock.seconds,
            "settings": self.settings,
            "provenance": self.run.provenance,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state`, strictly: a part that is missing or does not fit is an error."""
        algorithm = self.train_step
        algorithm.model.load_state_dict(state["model"])
        algorithm.loss.load_state_dict(state["loss"])
        algorithm.optimizer.load_state_dict(state["optimizer"])
        algorithm.scaler.load_state_dict(state["scaler"])
        set_rng_state(state["rng"])
        self.loader.load_state_dict(state["loader"])
        self.step = state["step"]
        self.best_score = state["best_score"]
        self.latest = state["latest"]
        self.clock.resume_from(state["train_time_s"])
