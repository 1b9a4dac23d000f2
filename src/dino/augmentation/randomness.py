"""Random numbers as a function of where they are used: Philox4x32-10, vectorised.

The generator is counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a number depends
on a key and a counter only, never on what was drawn before it. With key = seed and counter = (draw, view, sample index,
epoch), workers, ranks and resumes cannot change what a sample looks like.

Shapes: N rows, D draws per row.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

UInt64Array = NDArray[np.uint64]

# Multipliers and key increments of Philox4x32 (the paper's reference library, Random123, philox.h).
_MULTIPLIER_0: Final = np.uint64(0xD2511F53)
_MULTIPLIER_1: Final = np.uint64(0xCD9E8D57)
_KEY_STEP_0: Final = 0x9E3779B9
_KEY_STEP_1: Final = 0xBB67AE85
_NUM_ROUNDS: Final = 10
_LOW_WORD: Final = np.uint64(0xFFFFFFFF)
_WORD_BITS: Final = np.uint64(32)

ORDER_VIEW: Final = 0xFFFFFFFF  # the view number of the sample order, which no view can have
MAX_SEED: Final = 2**64 - 1


def philox(counter: tuple[Any, Any, Any, Any], seed: int) -> tuple[UInt64Array, UInt64Array, UInt64Array, UInt64Array]:
    """Four words of 32 bits for every counter.

    Args:
        counter: four words below 2**32, each a number or an array; they are broadcast to one shape.
        seed: the key of 64 bits; its low word is the first key word.

    Returns:
        Four arrays of that shape; every element is below 2**32.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed is {seed}; it must lie between 0 and 2**64 - 1")
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in counter))
    key_0, key_1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(_NUM_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> _WORD_BITS) ^ c1 ^ np.uint64(key_0),
            product_1 & _LOW_WORD,
            (product_0 >> _WORD_BITS) ^ c3 ^ np.uint64(key_1),
            product_0 & _LOW_WORD,
        )
        key_0, key_1 = (key_0 + _KEY_STEP_0) & 0xFFFFFFFF, (key_1 + _KEY_STEP_1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniforms(
    seed: int, epoch: int, indices: NDArray[np.int64], view: int | NDArray[np.int64], num_draws: int
) -> NDArray[np.float64]:
    """Uniform numbers of [0, 1), in steps of 2**-32. Asking for more draws leaves the earlier ones as they are.

    Args:
        indices: [N] sample indices.
        view: the view's number, one for all rows or [N].
        num_draws: D.

    Returns:
        [N, D].
    """
    views = np.asarray(view, dtype=np.int64)
    _check_counter(epoch, indices)
    assert views.size == 0 or (views.min() >= 0 and views.max() < ORDER_VIEW), "view numbers start at 0"
    num_blocks = -(-num_draws // 4)
    blocks = np.arange(num_blocks, dtype=np.uint64)
    words = philox((blocks, np.expand_dims(views, -1), np.asarray(indices)[:, None], epoch), seed)
    draws = np.stack(words, axis=-1).reshape(len(indices), 4 * num_blocks)[:, :num_draws]
    return draws.astype(np.float64) * 2.0**-32


def order_keys(seed: int, epoch: int, n: int) -> UInt64Array:
    """Keys of 64 bits, one for each of `n` samples; their argsort is the sample order of that epoch.

    They share no counter with `uniforms`, whatever the seed.

    Returns:
        [n].
    """
    indices = np.arange(n, dtype=np.int64)
    _check_counter(epoch, indices)
    high, low, _, _ = philox((0, ORDER_VIEW, indices, epoch), seed)
    return (high << _WORD_BITS) | low


def _check_counter(epoch: int, indices: NDArray[np.int64]) -> None:
    assert 0 <= epoch < 2**32, f"epoch {epoch} does not fit a counter word"
    assert len(indices) == 0 or (indices.min() >= 0 and indices.max() < 2**32), "an index does not fit a counter word"
