"""Evaluation in the middle of a run."""

import logging
import time
from typing import TYPE_CHECKING

from dino.evaluation import EvaluationInputs, evaluation_folder

if TYPE_CHECKING:
    from dino.training.trainer import Trainer

log = logging.getLogger("dino")


def evaluate(trainer: "Trainer") -> dict[str, float]:
    """What the evaluators find that are due at this step, and the seconds that they took; empty where none finds any.

    Every rank must call it, between two steps.
    """
    started, step = time.perf_counter(), trainer.step
    epoch, finished = step // trainer.steps_per_epoch, step == trainer.total_steps
    due = [evaluator for evaluator in trainer.evaluators if finished or epoch % evaluator.every_epochs == 0]
    if not due:
        return {}
    if step == 0:
        log.info("evaluating  the network before training")  # for some seconds there is nothing else to see
    model = trainer.train_step.whole_model()
    inputs = EvaluationInputs(
        model=model,
        backbone=model.teacher.backbone,
        dataset=trainer.dataset,
        augmentation=trainer.augmentation,
        loss=trainer.train_step.loss,
        device=trainer.device,
        autocast=trainer.train_step.precision.autocast,
        seed=trainer.seed,
        teacher_temp=trainer.train_step.schedules.teacher_temp(step),
        limit_samples=trainer.options.limit_evaluation_samples,
        untrained=step == 0,
        folder=evaluation_folder(trainer.run.directory, step),
        directory=trainer.run.directory,
        step=step,
    )
    metrics: dict[str, float] = {}
    for evaluator in due:
        metrics |= evaluator.evaluate(inputs)
    if metrics:
        metrics["perf/evaluation_s"] = time.perf_counter() - started
    return metrics
