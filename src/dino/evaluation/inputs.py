"""What an evaluator is given, what it is, and where it puts what is more than a number."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dino import ranks
from dino.augmentation import MultiCrop
from dino.backbone import Backbone
from dino.dataset import ImageDataset
from dino.loss import DINOLoss
from dino.model import StudentTeacher
from dino.run import write_json

log = logging.getLogger("dino")


def evaluation_folder(run: Path, step: int, about: str = "") -> Path:
    """Where an evaluation after so many steps leaves its files; `about` tells it from that of training."""
    return run / "evaluation" / "_".join(part for part in (f"step_{step:08d}", about) if part)


@contextlib.contextmanager
def left_out_on_errors(path: Path) -> Iterator[None]:
    """Where the disk refuses, an evaluation says so and goes on without the file."""
    try:
        yield
    except OSError as error:
        log.warning("%s is left out: %s", path, error.strerror or error)


@dataclass(frozen=True, kw_only=True)
class FeatureInputs:
    """A backbone and the data that tell what its features are worth; evaluators leave all of it as they found it."""

    backbone: Backbone  # the teacher's, in a run
    dataset: ImageDataset
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]  # the precision of the run
    seed: int
    limit_samples: int | None  # at most so many images per split; None: all
    untrained: bool  # True at step 0
    folder: Path | None  # for what is more than a number; None: such is not kept

    def write(self, name: str, content: dict[str, Any]) -> bool:
        """Puts plain values into `<name>.json` of the folder, on rank 0; a warning and False where the disk refuses."""
        if self.folder is None or ranks.rank() > 0:
            return True
        with left_out_on_errors(self.folder / f"{name}.json"):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / f"{name}.json", content)
            return True
        return False


@dataclass(frozen=True, kw_only=True)
class EvaluationInputs(FeatureInputs):
    """The state of a run in training."""

    model: StudentTeacher
    augmentation: MultiCrop
    loss: DINOLoss
    teacher_temp: float  # of the step at which the evaluation happens
    directory: Path  # of the run
    step: int  # finished optimizer steps


class Evaluator(Protocol):
    """An entry of the config group `evaluation`: has its own period and its own metric names.

    One that asks for no more than `FeatureInputs` also serves `dino evaluate`, on any weights.
    """

    every_epochs: int

    def evaluate(self, inputs: EvaluationInputs) -> dict[str, float]:
        """Metrics under their full names, such as `val/knn_top1`; empty where they cannot be had from these data."""
        ...
