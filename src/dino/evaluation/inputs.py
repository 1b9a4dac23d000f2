"""What an evaluator is given, and what it is."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dino.augmentation import MultiCrop
from dino.dataset import ImageDataset
from dino.loss import DINOLoss
from dino.model import StudentTeacher


@dataclass(frozen=True, kw_only=True)
class EvaluationInputs:
    """The state of a run that evaluators may read; they leave all of it as they found it."""

    model: StudentTeacher
    dataset: ImageDataset
    augmentation: MultiCrop
    loss: DINOLoss
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]  # the precision of the run
    seed: int
    teacher_temp: float  # of the step at which the evaluation happens
    limit_samples: int | None  # at most so many images per split; None: all
    untrained: bool  # True at step 0
    directory: Path  # of the run
    step: int  # finished optimizer steps


class Evaluator(Protocol):
    """An entry of the config group `evaluation`: has its own period and its own metric names."""

    every_epochs: int

    def evaluate(self, inputs: EvaluationInputs) -> dict[str, float]:
        """Metrics under their full names, such as `val/knn_top1`; empty where they cannot be had from these data."""
        ...
