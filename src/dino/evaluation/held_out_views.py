"""Views of held-out images, drawn once and for all: their randomness is that of epoch 0."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino.augmentation import MultiCrop, ViewBatch
from dino.dataset import Source, UnreadableImage
from dino.dataset.workers import BatchReader, iterate
from dino.evaluation.inputs import EvaluationInputs
from dino.evaluation.splits import Once

MAX_WORKERS = 8  # every tensor on its way from a worker holds an open file, and a batch of views has a dozen

Indices = NDArray[np.int64]


def in_batches(indices: Indices, batch_size: int) -> list[Indices]:
    """The indices in batches, the last as small as it comes out."""
    return [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]


def held_out_views(
    inputs: EvaluationInputs,
    source: Source,
    batches: Sequence[Indices],
    once: Once,
    *,
    augmentation: MultiCrop | None = None,
) -> Iterator[ViewBatch]:
    """Float views on the device, batch by batch. Unreadable images are left out, and named once.

    Args:
        inputs: whose seed, augmentation and device are used.
        source: the images.
        batches: their indices.
        once: says what could not be read.
        augmentation: in place of that of the run.
    """
    augmentation = inputs.augmentation if augmentation is None else augmentation
    reader = _HeldOutReader(source, augmentation, inputs.seed)
    for views, failures in iterate(reader, batches, num_workers=min(inputs.dataset.num_workers, MAX_WORKERS)):
        for failure in failures:
            once.say(f"unreadable image, left out of the evaluation of views: {failure}")
        if views is not None:
            views = views.to(inputs.device)
            yield augmentation.photometric(views)


class _HeldOutReader(BatchReader[tuple[ViewBatch | None, list[str]]]):
    """Reads the images of one batch and makes their views of epoch 0, and says what could not be read.

    With `augmentation.photometric_device=cpu` the photometric part runs here too, as in training.
    """

    def __init__(self, source: Source, augmentation: MultiCrop, seed: int) -> None:
        self.source = source
        self.augmentation = augmentation
        self.seed = seed

    def __getitem__(self, indices: Indices) -> tuple[ViewBatch | None, list[str]]:
        images, shown, failures = self._read(indices)
        if len(shown) == 0:
            return None, failures
        views = self.augmentation.views(images, shown, self.seed, epoch=0)
        if self.augmentation.photometric_device == "cpu":
            views = self.augmentation.colour(views)
        return views, failures

    def _read(self, indices: Indices) -> tuple[Tensor | list[Tensor], Indices, list[str]]:
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
