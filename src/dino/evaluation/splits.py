"""Which images are evaluated: all of a split, or a sample of it that is always the same."""

import logging

import numpy as np

from dino.dataset import EvaluationLoader, ImageDataset, Source, SubsetSource, spread_indices
from dino.ranks import own_part, world_size

log = logging.getLogger("dino")


def smaller(*limits: int | None) -> int | None:
    """The smallest of the limits that are given; None if none is."""
    return min((limit for limit in limits if limit is not None), default=None)


def limited(source: Source, limit: int | None) -> Source:
    """`source`, or a sample of it that is spread over all of it."""
    return source if limit is None or limit >= len(source) else SubsetSource(source, spread_indices(len(source), limit))


def held_out_or_training(dataset: ImageDataset) -> Source:
    """The held-out images; the training images where none are held out."""
    splits = dataset.evaluation()
    return dataset.train() if splits is None else splits[1]


def evaluation_loader(source: Source, dataset: ImageDataset) -> EvaluationLoader:
    """Reads `source` as `dataset` is evaluated: resized, cropped to the center, in order, none left out.

    Under several ranks each reads its own part, in the batches of a single process.
    """
    if world_size() > 1:
        source = SubsetSource(source, np.arange(len(source))[own_part(len(source), dataset.batch_size)])
    return EvaluationLoader(
        source,
        size=dataset.evaluation_size,
        resize=dataset.evaluation_resize,
        batch_size=dataset.batch_size,
        num_workers=dataset.num_workers,
    )


class Once:
    """Says each sentence a single time, however often an evaluator comes by."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, sentence: str, level: int = logging.INFO) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            log.log(level, sentence)
