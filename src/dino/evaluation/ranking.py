"""How good rankings are, in the way of the retrieval benchmarks (Radenovic et al. 2018, "Revisiting Oxford and Paris").

Shapes: M images in a ranking.
"""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

Ranking = NDArray[np.int64]  # [M] images, best first


def positive_ranks(ranking: Ranking, positives: Collection[int], ignored: Collection[int] = ()) -> NDArray[np.int64]:
    """Ranks of the positives, from 0, as if the ignored images were not there."""
    junk = np.isin(ranking, list(ignored))
    places = np.flatnonzero(np.isin(ranking, list(positives)) & ~junk)
    ranks: NDArray[np.int64] = places - junk.cumsum()[places]
    return ranks


def average_precision(ranks: Sequence[int] | NDArray[np.int64], num_positives: int) -> float:
    """Area under precision over recall by trapezoids, 0 to 1; positives that are not in `ranks` were not found."""
    area = 0.0
    for found, rank in enumerate(np.sort(np.asarray(ranks, dtype=np.int64)).tolist()):
        before = 1.0 if rank == 0 else found / rank
        area += (before + (found + 1) / (rank + 1)) / 2 / num_positives
    return area


def precision_at(ranks: Sequence[int] | NDArray[np.int64], k: int) -> float:
    """Share of positives among the first k images, or among those up to the last positive where that comes before."""
    places = np.asarray(ranks, dtype=np.int64) + 1
    length = min(int(places.max()), k)
    return int((places <= length).sum()) / length
