"""Samples of a split are spread over it, always the same, and never repeat an image."""

import numpy as np
import pytest

from dino.dataset import spread_indices
from dino.evaluation.splits import smaller


@pytest.mark.parametrize(("size", "limit"), [(10, 3), (10, 9), (1437, 200), (7, 7), (100, 1), (1_281_167, 50_000)])
def test_one_index_from_each_equal_stretch(size: int, limit: int) -> None:
    indices = spread_indices(size, limit)
    borders = np.arange(limit + 1) * size // limit
    assert len(indices) == limit
    assert bool(((borders[:-1] <= indices) & (indices < borders[1:])).all())
    assert np.array_equal(indices, spread_indices(size, limit))


@pytest.mark.parametrize("limit", [None, 20, 21])
def test_without_a_limit_that_bites_all_are_taken(limit: int | None) -> None:
    assert spread_indices(20, limit).tolist() == list(range(20))


@pytest.mark.parametrize("order", ["sorted", "alternating"])
def test_every_class_is_covered_evenly(order: str) -> None:
    """Class folders come sorted; other sets repeat their classes in turn, where a plain stride would see only one."""
    labels = np.arange(2000) * 10 // 2000 if order == "sorted" else np.arange(2000) % 10
    counts = np.bincount(labels[spread_indices(2000, 200)], minlength=10)
    assert counts.min() >= 15
    assert counts.max() <= 25


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="limit of 0"):
        spread_indices(5, 0)


def test_the_smallest_given_limit_counts() -> None:
    assert smaller(None, 5, 3) == 3
    assert smaller(None, 5) == 5
    assert smaller(None, None) is None
