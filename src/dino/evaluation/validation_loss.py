"""The DINO loss on held-out images.

Shapes: B images in a batch, G global views, V all views, K prototypes.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino import preemption, ranks
from dino.augmentation import MultiCrop, ViewBatch
from dino.dataset import Source, UnreadableImage, spread_indices
from dino.dataset.workers import BatchReader, iterate
from dino.evaluation.features import evaluation_mode
from dino.evaluation.inputs import EvaluationInputs
from dino.evaluation.splits import Once, smaller
from dino.loss import DINOLoss, LossTerms

MAX_WORKERS = 8  # every tensor on its way from a worker holds an open file, and a batch of views has a dozen


@dataclass(kw_only=True)
class ValidationLossEvaluator:
    """The training loss on held-out images: `val/loss`, `val/loss_global`, `val/loss_local` (without local views: not).

    The views are those of training, drawn once and for all: their randomness is that of epoch 0, so a change of the
    value is a change of the network, the center or the teacher temperature. Note that the loss of DINO is no measure of
    progress by itself: its target moves, and it can fall while the features collapse.

    Student and teacher run in evaluation mode: without drop path or dropout, hence without a draw from a global random
    stream, and with the running statistics of batch norm. The loss works on a copy of the loss module, so the center is
    the one of the run and stays as it is.

    Under several ranks each takes some of the batches, and every rank gets the value that a single process would.

    Args:
        every_epochs: period; read by the trainer.
        max_samples: at most so many held-out images, spread over the split.

    Raises:
        ValueError: for a number out of its range, naming the key.
    """

    every_epochs: int = 10
    max_samples: int = 2048
    _once: Once = field(default_factory=Once, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("every_epochs", "max_samples"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"evaluation.validation_loss.{name}={getattr(self, name)}: use a whole number of at least 1"
                )

    def evaluate(self, inputs: EvaluationInputs) -> dict[str, float]:
        """Means over the held-out images; empty, with one line in the log, where there is no held-out split.

        Raises:
            Preempted: a signal came to this rank or another.
        """
        splits = inputs.dataset.evaluation()
        if splits is None:
            self._once.say(f"no validation loss: dataset {inputs.dataset.name} has no held-out split")
            return {}
        loss = copy.deepcopy(inputs.loss).eval()
        indices = spread_indices(len(splits[1]), smaller(self.max_samples, inputs.limit_samples))
        size = inputs.dataset.batch_size
        batches = [indices[first : first + size] for first in range(0, len(indices), size)]
        batches = batches[ranks.own_part(len(batches))]
        own: list[tuple[int, dict[str, float]]] = []  # of each batch: B and its losses
        # Some ranks may have a batch less, so inside none may wait for the others.
        with torch.inference_mode(), evaluation_mode(inputs.model), ranks.alone():
            for views in preemption.until_requested(self._views(inputs, splits[1], batches)):
                terms = _loss_terms(inputs, loss, views)
                named = {"loss": terms.total, "loss_global": terms.global_term, "loss_local": terms.local_term}
                losses = {name: value.item() for name, value in named.items() if value is not None}
                own.append((views.global_views.shape[1], losses))
        preemption.check()
        sums: dict[str, float] = {}
        num_images = 0
        for batch_size, losses in itertools.chain(*ranks.gather_objects(own)):
            for name, value in losses.items():
                # A batch's loss is the mean over its images, so weighting by B makes the last one count right.
                sums[name] = sums.get(name, 0.0) + batch_size * value
            num_images += batch_size
        if num_images == 0:
            self._once.say(f"no validation loss: no held-out image of dataset {inputs.dataset.name} can be read")
        return {f"val/{name}": total / num_images for name, total in sums.items()}

    def _views(
        self, inputs: EvaluationInputs, source: Source, batches: Sequence[NDArray[np.int64]]
    ) -> Iterator[ViewBatch]:
        """Float views on the device, the last batch as small as it comes out. Unreadable images are left out."""
        reader = _HeldOutReader(source, inputs.augmentation, inputs.seed)
        for views, failures in iterate(reader, batches, num_workers=min(inputs.dataset.num_workers, MAX_WORKERS)):
            for failure in failures:
                self._once.say(f"unreadable image, left out of the validation loss: {failure}")
            if views is not None:
                views = views.to(inputs.device)
                yield inputs.augmentation.photometric(views) if views.parameters is not None else views


class _HeldOutReader(BatchReader[tuple[ViewBatch | None, list[str]]]):
    """Reads the images of one batch and makes their views of epoch 0, and says what could not be read.

    With `augmentation.photometric_device=cpu` the photometric part runs here too, as in training.
    """

    def __init__(self, source: Source, augmentation: MultiCrop, seed: int) -> None:
        self.source = source
        self.augmentation = augmentation
        self.seed = seed

    def __getitem__(self, indices: NDArray[np.int64]) -> tuple[ViewBatch | None, list[str]]:
        images, shown, failures = self._read(indices)
        if len(shown) == 0:
            return None, failures
        views = self.augmentation.views(images, shown, self.seed, epoch=0)
        if self.augmentation.photometric_device == "cpu":
            views = self.augmentation.photometric(views)
        return views, failures

    def _read(self, indices: NDArray[np.int64]) -> tuple[Tensor | list[Tensor], NDArray[np.int64], list[str]]:
        """The images that can be read, their indices, and what was wrong with the others."""
        if self.source.images is not None:
            return self.source.images[torch.from_numpy(indices)], indices, []
        images, shown, failures = [], [], []
        for index in indices.tolist():
            try:
                images.append(self.source.read(index))
            except UnreadableImage as error:
                failures.append(str(error))
            else:
                shown.append(index)
        return images, np.array(shown, dtype=np.int64), failures


def _loss_terms(inputs: EvaluationInputs, loss: DINOLoss, views: ViewBatch) -> LossTerms:
    with inputs.autocast():
        teacher_logits = inputs.model.teacher_forward(views.global_views)
        student_logits, features = inputs.model.student_forward(views.global_views, views.local_views)
    terms: LossTerms = loss(student_logits, teacher_logits, len(views.global_views), inputs.teacher_temp, features)
    return terms
