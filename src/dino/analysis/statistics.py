"""Numbers about curves: trend, rank correlation, outliers, thinning. NaN-free input unless it says otherwise."""

import math
from dataclasses import dataclass

import numpy as np

from dino.analysis.history import Floats, Series

MAD_TO_STD = 1.4826  # median absolute deviation -> standard deviation of a normal distribution
WINDOW = 51  # logged points of a rolling median
MIN_POINTS = 10  # fewer say nothing about trend and outliers


@dataclass(frozen=True)
class Trend:
    """A straight line through the newest third of a curve.

    Attributes:
        slope: per 1000 steps, in the metric's unit.
        moves: whether the change over that third stands out: beyond two standard errors, and above 1 % of the level.
    """

    slope: float
    moves: bool


def trend(series: Series) -> Trend | None:
    """None for a curve with too few finite points."""
    series = series.finite
    recent = Series(
        series.steps[-max(len(series) // 3, MIN_POINTS) :], series.values[-max(len(series) // 3, MIN_POINTS) :]
    )
    if len(recent) < MIN_POINTS or recent.steps[-1] == recent.steps[0]:
        return None
    x, y = recent.steps - recent.steps.mean(), recent.values - recent.values.mean()
    spread = float(x @ x)
    slope = float(x @ y) / spread
    error = math.sqrt(float(((y - slope * x) ** 2).sum()) / (len(x) - 2) / spread)
    change = abs(slope) * float(recent.steps[-1] - recent.steps[0])
    moves = abs(slope) > 2 * error and change > 0.01 * abs(float(recent.values.mean()))
    return Trend(1000 * slope, moves)


def rank_correlation(first: Floats, second: Floats) -> float | None:
    """Spearman's; equal values share the mean of their ranks. None where one of the two is constant."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: Floats) -> Floats:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Floats = (ends - (counts - 1) / 2)[places]
    return ranks


def at_same_steps(first: Series, second: Series) -> tuple[Floats, Floats]:
    """The values of both at the steps that both have."""
    first, second = first.finite, second.finite
    _, of_first, of_second = np.intersect1d(first.steps, second.steps, return_indices=True)
    return first.values[of_first], second.values[of_second]


def outliers(values: Floats, *, deviations: float, at_least: Floats | float) -> list[int]:
    """Indices of upward outliers: far above the rolling median, in robust standard deviations and by `at_least`."""
    if len(values) < MIN_POINTS:
        return []
    half = WINDOW // 2
    padded = np.pad(values, half, mode="reflect" if len(values) > half else "edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    median = np.median(windows, axis=1)
    deviation = MAD_TO_STD * np.median(np.abs(windows - median[:, None]), axis=1)
    excess = values - median
    return [int(index) for index in np.flatnonzero((excess > deviations * deviation) & (excess > at_least))]


def grouped(indices: list[int], gap: int = 3) -> list[list[int]]:
    """Indices that follow each other closely are one thing that happened."""
    groups: list[list[int]] = []
    for index in indices:
        if groups and index - groups[-1][-1] <= gap:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def thinned(series: Series, max_points: int) -> Series:
    """At most about `max_points` of a curve: of each stretch its lowest and its highest, so that spikes stay.

    The first and the last point stay, and so does the gap where a stretch holds values that are not finite.
    """
    count = len(series)
    if count <= max_points:
        return series
    kept = {0, count - 1}
    for stretch in np.array_split(np.arange(count), max(1, (max_points - 2) // 3)):
        values = series.values[stretch]
        finite = np.flatnonzero(np.isfinite(values))
        if len(finite):
            kept |= {int(stretch[finite[values[finite].argmin()]]), int(stretch[finite[values[finite].argmax()]])}
        if len(finite) < len(stretch):
            kept.add(int(stretch[np.flatnonzero(~np.isfinite(values))[0]]))
    places = sorted(kept)
    return Series(series.steps[places], series.values[places])
