"""The order of the images: every one once, the same on any number of processes."""

import itertools

import numpy as np
import pytest

from dino.dataset import ShuffledSampler, steps_per_epoch


def epoch_of(sampler: ShuffledSampler, epoch: int = 0, first: int = 0) -> list[list[int]]:
    return [batch.tolist() for batch in sampler.batches(epoch, first)]


def test_every_image_comes_at_most_once_and_the_rest_is_dropped() -> None:
    sampler = ShuffledSampler(103, 10, seed=0)
    batches = epoch_of(sampler)
    assert len(batches) == sampler.num_batches == 10
    seen = list(itertools.chain(*batches))
    assert len(seen) == len(set(seen)) == 100
    assert set(seen) <= set(range(103))
    assert seen != sorted(seen)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    reference = epoch_of(ShuffledSampler(50, 5, seed=3), epoch=2)
    assert epoch_of(ShuffledSampler(50, 5, seed=3), epoch=2) == reference
    larger = epoch_of(ShuffledSampler(50, 10, seed=3), epoch=2)
    assert list(itertools.chain(*larger)) == list(itertools.chain(*reference))
    assert epoch_of(ShuffledSampler(50, 5, seed=4), epoch=2) != reference
    assert epoch_of(ShuffledSampler(50, 5, seed=3), epoch=1) != reference


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_the_order_of_one_process(world_size: int) -> None:
    together = epoch_of(ShuffledSampler(100, 4 * world_size, seed=1), epoch=5)
    ranks = [epoch_of(ShuffledSampler(100, 4, 1, rank, world_size), epoch=5) for rank in range(world_size)]
    assert [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == together


def test_starting_in_the_middle_skips_batches() -> None:
    sampler = ShuffledSampler(60, 7, seed=0)
    assert epoch_of(sampler, epoch=1, first=3) == epoch_of(sampler, epoch=1)[3:]
    assert epoch_of(sampler, epoch=1, first=sampler.num_batches) == []


def test_positions_are_uniform() -> None:
    """Image 0 lands in the first half of the epoch about half of the time."""
    sampler = ShuffledSampler(64, 32, seed=0)
    first_half = [0 in next(sampler.batches(epoch)) for epoch in range(400)]
    assert abs(np.mean(first_half) - 0.5) < 0.1  # four standard deviations


def test_too_few_images_are_told_with_what_would_be_right() -> None:
    with pytest.raises(ValueError, match=r"dataset\.batch_size=64.*only 50 training images.*at most 50"):
        ShuffledSampler(50, 64, seed=0)
    with pytest.raises(ValueError, match=r"takes 64 images \(dataset\.batch_size=16 x 4 processes\).*at most 12"):
        ShuffledSampler(50, 16, seed=0, rank=0, world_size=4)
    with pytest.raises(ValueError, match=r"trainer\.accumulate_steps=8.*at most 6"):
        steps_per_epoch(50, 16, accumulate_steps=8)
    with pytest.raises(ValueError, match="at most 3 processes x accumulated batches"):
        steps_per_epoch(3, 1, world_size=4)
    with pytest.raises(ValueError, match="no training images"):
        ShuffledSampler(0, 1, seed=0)


def test_steps_per_epoch_counts_whole_optimizer_steps() -> None:
    assert steps_per_epoch(1000, 16, world_size=2, accumulate_steps=4) == 7
