"""The training loop: `fit` reads top to bottom; the algorithm itself is in `step.py`.

`step` counts finished optimizer steps, here and in every file that a run leaves: step 0 is the untrained network.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dino import preemption, ranks
from dino.augmentation import MultiCrop, ViewBatch
from dino.dataset import ImageDataset, TrainLoader
from dino.evaluation import Evaluator
from dino.logger import Logger, RunContext
from dino.monitor import EPOCH_LOSS, OF_STEPS, Monitor, memory_statistics
from dino.optimizer import half_life_steps
from dino.run import CollapseError, Run
from dino.runtime import what_lives_stays
from dino.start_up import StartUp
from dino.training.checkpoint import CheckpointStore, SaveError
from dino.training.clock import TrainingClock
from dino.training.evaluate import evaluate
from dino.training.health_watch import HealthWatch
from dino.training.memory import advice_when_out_of_memory
from dino.training.non_finite import NonFiniteWatch
from dino.training.options import TrainerOptions
from dino.training.prefetch import prefetched
from dino.training.state import restore_best, state_of
from dino.training.step import StepOutput, TrainStep

log = logging.getLogger("dino")


@dataclass(kw_only=True)
class Trainer:
    """Trains a student against its EMA teacher; everything it needs is handed in.

    `fit` runs from `step` to the end; `state.py` says what of it a checkpoint holds. `settings` are the plain settings
    that change results; they travel with the checkpoints.

    Under several ranks each has a trainer of its own, and all methods are called by all of them; only rank 0 has
    loggers and writes checkpoints.
    """

    options: TrainerOptions
    train_step: TrainStep
    dataset: ImageDataset
    loader: TrainLoader
    augmentation: MultiCrop
    monitor: Monitor
    evaluators: Sequence[Evaluator]
    loggers: Sequence[Logger]
    run: Run
    seed: int
    settings: dict[str, Any]
    steps_per_epoch: int
    start_up: StartUp
    step: int = 0
    evaluated_step: int | None = None  # the last step whose evaluation is complete
    latest: dict[str, float] = field(default_factory=dict)  # what is known of this step, for the list of checkpoints
    origin: str | None = None  # the `resume=PATH` that this run began with

    def __post_init__(self) -> None:
        self.device = self.train_step.precision.device
        self.images_per_step = self.loader.batch_size * self.options.accumulate_steps * ranks.world_size()
        self.total_steps = self.options.epochs * self.steps_per_epoch
        if self.options.max_steps is not None:
            self.total_steps = min(self.total_steps, self.options.max_steps)
        self.checkpoints = CheckpointStore(self.run.directory / "checkpoints", self.options.keep_checkpoints)
        self.non_finite = NonFiniteWatch(
            self.options.max_skipped_steps, self.run.directory / "non_finite", ranks.rank()
        )
        self.early_stopping = self.monitor.early_stopping
        self.health = HealthWatch(self.monitor, self.loggers, self.train_step, self.total_steps, self.settings)
        self.clock = TrainingClock()
        self.epoch_loss = torch.zeros(2, dtype=torch.float64, device=self.device)  # sum and number of good steps
        self._changed = False  # since the last checkpoint
        self._best_is_new = False
        self._last_logged_step = 0

    # ------------------------------------------------------------------ the loop

    def fit(self) -> None:
        """Trains to the end.

        Raises:
            Preempted: a signal came; everything is saved.
            NonFiniteError: more broken steps than allowed.
            CollapseError: a verdict on the run's health, and `monitor.on_collapse` is `stop`.
            SaveError: a checkpoint could not be written, and `trainer.on_save_error` is `stop`, or it was the last.
        """
        try:
            with what_lives_stays(), advice_when_out_of_memory(self.options, self.loader.batch_size):
                self._start()
                while not self.finished:
                    for window in self._rest_of_epoch():
                        output = self.train_step(self.step, window, observe=self._logs(self.step))
                        self.step += 1
                        if not self.start_up.done:
                            self._tell_start_up()
                        self._after_step(window, output)
                        self._between_steps()
                        if self.finished:
                            break
                self._finish()
        finally:
            self._close()

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps or self.early_stopping.exhausted

    def _rest_of_epoch(self) -> Iterator[list[ViewBatch]]:
        """From the current step on: windows of `accumulate_steps` micro-batches, as float views on the device."""
        epoch, position = divmod(self.step, self.steps_per_epoch)
        count = self.options.accumulate_steps
        batches = map(self._to_device, self.loader.epoch(epoch, first_batch=position * count))
        number = self.steps_per_epoch - position
        windows = prefetched((list(itertools.islice(batches, count)) for _ in range(number)), self.device)
        for _ in range(number):
            self.train_step.timer.begin()
            window = next(windows)
            self.train_step.timer.mark("data_wait")
            yield window

    def _logs(self, step: int) -> bool:
        """Whether step number `step`, counted from 0, is logged."""
        return self.monitor.statistics.due(step) or step + 1 == self.total_steps

    def _to_device(self, batch: ViewBatch) -> ViewBatch:
        batch = batch.to(self.device, non_blocking=True)
        return self.augmentation.photometric(batch)

    def _after_step(self, window: Sequence[ViewBatch], output: StepOutput) -> None:
        self._changed = True
        good = ~output.skipped
        loss = torch.where(good, output.loss, 0.0)
        self.epoch_loss += torch.stack([loss.to(self.epoch_loss), good.to(self.epoch_loss)])
        for logger in self.loggers:
            logger.advance(self.step)
        # Before the statistics: on a GPU this tells of the step before, whose line stands already.
        self._report_broken(self.non_finite.watch(self.step, window, output, self.train_step))
        self.latest = {name: value for name, value in self.latest.items() if name.startswith(OF_STEPS)}
        self.latest.pop(EPOCH_LOSS, None)
        self.health.announce(self.step)
        if output.outputs is not None:
            self._log_statistics(output)

    def _between_steps(self) -> None:
        """Evaluates and saves where due, and gives way to a signal: also in the middle of an evaluation."""
        try:
            preemption.check()
            with self.clock.paused():
                if self._evaluation_is_due():
                    self._evaluate()
                if self._save_is_due():
                    self.save()
        except preemption.Preempted as stop:
            if self._changed:
                self.save()
            self.checkpoints.wait()
            ranks.wait_for_all()  # some launchers end all tasks when the first one has ended
            error = self.checkpoints.take_error()
            if error is not None:
                newest = self.checkpoints.saved_step
                left = "there is none before it" if newest is None else f"the newest is that of step {newest}"
                raise preemption.Preempted(f"{stop}, but the {error}; {left}") from None
            raise
        error = self.checkpoints.take_error()
        if error is not None and self.options.on_save_error == "stop":
            raise error
        if self.health.collapse is not None:
            self.save()
            self.checkpoints.wait()
            ranks.wait_for_all()  # some launchers end all tasks when the first one has ended
            raise CollapseError(f"step {self.step}: {self.health.collapse}")

    # ------------------------------------------------------------------ start, log, finish, close

    def _start(self) -> None:
        if ranks.rank() == 0:
            self.checkpoints.tidy()
            for path in self.checkpoints.set_aside(after=self.step):
                log.warning("set aside   %s: newer than where the run goes on, or damaged", path)
            self.checkpoints.point_best_to(self.early_stopping.best_step)
            if self.step == 0 and self.run.status.get("saved_step") and (kept := self.checkpoints.set_metrics_aside()):
                log.warning("set aside   %s: of the run that was here", kept)
        self._last_logged_step = self.step
        self.run.update(total_steps=self.total_steps, saved_step=self.checkpoints.saved_step)
        context = RunContext(self.run.directory, self.step, self.total_steps, self.steps_per_epoch)
        for logger in self.loggers:
            logger.start(context)
        self.start_up.mark("checkpoint")
        self._between_steps()  # the evaluation of step 0, or one that a signal cut short
        self.start_up.mark("evaluation")
        self.clock.start()

    def _tell_start_up(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # once in a process
        self.start_up.mark("first step")
        log.info("first step  %s", self.start_up)
        if self.device.type == "cpu" and (notice := self.start_up.notice(torch.get_num_threads())):
            log.info("note        %s", notice)

    def _log_statistics(self, output: StepOutput) -> None:
        seconds, steps = self.clock.lap(), self.step - self._last_logged_step
        self._last_logged_step = self.step
        loss, student = self.train_step.loss, self.train_step.student_with_gradients()
        metrics = self.monitor.statistics.compute(self.step - 1, output, loss, student)
        metrics |= {f"train/{name}": value for name, value in output.scheduled.items()}
        momentum = output.scheduled["teacher_momentum"]
        metrics["train/teacher_half_life_samples"] = half_life_steps(momentum) * self.images_per_step
        metrics["perf/step_time_s"] = seconds / steps
        metrics["perf/images_per_s"] = steps * self.images_per_step / seconds
        metrics |= self.train_step.timer.lap(steps) | memory_statistics(self.device) | self.start_up.metrics()
        self.early_stopping.check(metrics)
        self._log(metrics)
        self.run.update(step=self.step, saved_step=self.checkpoints.saved_step)

    def _log(self, metrics: dict[str, float]) -> None:
        self.latest |= metrics
        for logger in self.loggers:
            logger.log(self.step, metrics)
        self.health.look(self.step, metrics)

    def _report_broken(self, step: int | None) -> None:
        if step is not None:
            for logger in self.loggers:
                logger.event(step, "skipped_step", "the loss or a gradient was not finite; nothing was updated")
            self.health.skipped(step)
            if self.non_finite.too_many is not None:
                raise self.non_finite.too_many

    def _finish(self) -> None:
        """The last state is on the disk, or the run has failed: on all ranks."""
        self._report_broken(self.non_finite.settle(self.train_step))
        self.checkpoints.wait()
        if self._changed or ranks.from_main(self.checkpoints.saved_step != self.step):
            self.save()
            self.checkpoints.wait()
        error, newest = self.checkpoints.take_error(), self.checkpoints.saved_step
        if error is not None:
            place = "the beginning" if newest is None else f"step {newest}"
            error = SaveError(f"{error}; when that is put right, the same command goes on from {place}")
        error = ranks.from_main(None if newest == self.step else error)
        if error is not None:
            raise error
        if self.early_stopping.exhausted:
            log.info("stopped     %s", self.early_stopping.reason)
            self.run.update(reason=self.early_stopping.reason)
        if self.early_stopping.restore_best:
            restore_best(self)

    def _close(self) -> None:
        """Also after an exception: a progress bar gives the terminal back, `status.json` will name the last step."""
        for logger in self.loggers:
            logger.close()
        self.checkpoints.wait()
        self.run.status |= {"step": self.step, "saved_step": self.checkpoints.saved_step}

    # ------------------------------------------------------------------ evaluate, save

    def _evaluation_is_due(self) -> bool:
        at_boundary = self.step % self.steps_per_epoch == 0 or self.step == self.total_steps
        return at_boundary and self.evaluated_step != self.step

    def _evaluate(self) -> None:
        """Runs the evaluators that are due, and closes the books on the epoch."""
        self._report_broken(self.non_finite.settle(self.train_step))
        metrics = evaluate(self)
        self.evaluated_step = self.step
        self._changed = True
        if self.step == 0:
            self.early_stopping.choose(set(metrics))
        else:
            metrics |= self._close_epoch()
            # Times differ from rank to rank, and what follows must not.
            self._best_is_new = self.early_stopping.update(self.step, ranks.from_main(self.latest | metrics))
        if metrics:
            self._log(metrics)

    def _close_epoch(self) -> dict[str, float]:
        """The mean loss of the epoch so far; what ranks have met apart is put together."""
        self.loader.share_bad_images()
        total, count = ranks.sum_over_ranks(self.epoch_loss.clone()).tolist()
        if self.step % self.steps_per_epoch == 0:
            self.epoch_loss.zero_()
        return {EPOCH_LOSS: total / count} if count else {}

    def _save_is_due(self) -> bool:
        if not self._changed or self.step == 0:
            return False
        epoch, position = divmod(self.step, self.steps_per_epoch)
        steps, epochs = self.options.save_every_steps, self.options.save_every_epochs
        by_step = steps is not None and self.step % steps == 0
        by_epoch = epochs is not None and position == 0 and epoch % epochs == 0
        return self._best_is_new or self.finished or by_step or by_epoch

    def save(self) -> None:
        """Hands a copy of the state to the writer; its errors show in `checkpoints.take_error()`."""
        self._report_broken(self.non_finite.settle(self.train_step))
        self.loader.share_bad_images()
        state = state_of(self)
        if ranks.rank() == 0:
            self._write(state)
        self._changed = self._best_is_new = False

    def _write(self, state: dict[str, Any]) -> None:
        epoch, position = divmod(self.step, self.steps_per_epoch)
        every = self.options.keep_every_epochs
        stays = every is not None and position == 0 and epoch % every == 0
        try:
            for logger in self.loggers:
                logger.flush()
        except OSError as error:
            self.checkpoints.fail(self.step, error)
            return
        best_step = self.early_stopping.best_step
        self.checkpoints.save(self.step, state, self.latest, best_step=best_step, stays=stays)
