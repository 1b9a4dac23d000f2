"""The order of the training images: a function of seed and epoch, whatever the number of processes.

Shape legend: B images per process and batch, N images of the dataset.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dino.augmentation.randomness import order_keys


class ShuffledSampler:
    """Shuffles the images of every epoch and deals them out in batches; the last, incomplete batch is dropped.

    The order is that of random keys drawn for (seed, epoch). Batch b of all processes together is
    `order[b * B * world_size : (b + 1) * B * world_size]`, of which every rank takes one contiguous part.

    Args:
        num_samples: N.
        batch_size: B.
        seed: seed of the run.
        rank: this process, from 0.
        world_size: number of processes.

    Raises:
        ValueError: there are not enough images for one batch.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        assert 0 <= rank < world_size
        self.num_batches = steps_per_epoch(num_samples, batch_size, world_size)
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def batches(self, epoch: int, first: int = 0) -> Iterator[NDArray[np.int64]]:
        """Sample indices [B] of this rank, from batch `first` of the epoch on; skipping costs nothing."""
        order = np.argsort(order_keys(self.seed, epoch, self.num_samples), kind="stable").astype(np.int64)
        for batch in range(first, self.num_batches):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield order[start : start + self.batch_size]


def steps_per_epoch(num_samples: int, batch_size: int, world_size: int = 1, accumulate_steps: int = 1) -> int:
    """Optimizer steps of one epoch, each over `accumulate_steps` batches of every process; the rest is dropped.

    Raises:
        ValueError: there would be none.
    """
    if num_samples < 1:
        raise ValueError("the dataset has no training images: check dataset.root")
    per_process = world_size * accumulate_steps
    steps = num_samples // (batch_size * per_process)
    if steps > 0:
        return steps
    factors = [f"dataset.batch_size={batch_size}"]
    factors += [f"{world_size} processes"] if world_size > 1 else []
    factors += [f"trainer.accumulate_steps={accumulate_steps}"] if accumulate_steps > 1 else []
    largest = num_samples // per_process
    advice = (
        f"set dataset.batch_size to at most {largest}"
        if largest
        else f"use at most {num_samples} processes x accumulated batches"
    )
    raise ValueError(
        f"one step takes {batch_size * per_process} images ({' x '.join(factors)}), "
        f"but there are only {num_samples} training images: {advice}"
    )
