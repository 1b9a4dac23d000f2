"""Philox against the published vectors, and the promises that sample order and views rest on."""

import numpy as np
import pytest

from dino.augmentation.randomness import order_keys, philox, uniforms


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, int, int, int], seed: int, expected: tuple[int, ...]) -> None:
    """The known-answer vectors of Random123 (kat_vectors, philox4x32 10)."""
    assert tuple(int(word) for word in philox(counter, seed)) == expected


def test_uniforms_are_a_function_of_their_arguments_only() -> None:
    indices = np.array([3, 70_000, 0, 5])
    together = uniforms(7, 2, indices, view=1, num_draws=10)
    assert together.shape == (4, 10)
    for row, index in enumerate(indices):
        alone = uniforms(7, 2, np.array([index]), view=1, num_draws=10)
        np.testing.assert_array_equal(alone[0], together[row])
    by_row = uniforms(7, 2, np.array([3, 3]), view=np.array([0, 1]), num_draws=10)
    np.testing.assert_array_equal(by_row[1], together[0])
    assert (by_row[0] != by_row[1]).all()


def test_more_draws_leave_the_earlier_ones() -> None:
    indices = np.arange(6)
    np.testing.assert_array_equal(uniforms(0, 0, indices, 0, 33)[:, :5], uniforms(0, 0, indices, 0, 5))


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}, {"view": 1}, {"seed": 2**32}, {"seed": 2**63}])
def test_every_argument_matters(other: dict[str, int]) -> None:
    arguments = {"seed": 0, "epoch": 0, "view": 0} | other
    indices = np.arange(50)
    assert (uniforms(indices=indices, num_draws=8, **arguments) != uniforms(0, 0, indices, 0, 8)).mean() > 0.99


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    draws = uniforms(0, 0, np.arange(20_000), 0, 8)
    assert draws.min() >= 0
    assert draws.max() < 1
    np.testing.assert_allclose(draws.mean(axis=0), 0.5, atol=4 * (1 / 12 / 20_000) ** 0.5)
    np.testing.assert_allclose(draws.var(axis=0), 1 / 12, atol=0.003)
    correlation = np.corrcoef(draws.T) - np.eye(8)
    assert np.abs(correlation).max() < 4 / 20_000**0.5
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    assert ((counts - 8_000) ** 2 / 8_000).sum() < 45  # chi-square with 19 degrees of freedom: 1 in 1,000


def test_order_keys_give_a_fresh_permutation_every_epoch() -> None:
    orders = [np.argsort(order_keys(seed, epoch, 1_000)) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1_000))
    for i in range(4):
        for j in range(i):
            assert (orders[i] == orders[j]).sum() < 10
    assert len(np.unique(order_keys(0, 0, 100_000))) == 100_000


def test_order_keys_do_not_depend_on_the_number_of_samples() -> None:
    np.testing.assert_array_equal(order_keys(3, 4, 100)[:40], order_keys(3, 4, 40))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_is_no_key_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed is {seed}"):
        order_keys(seed, 0, 3)
