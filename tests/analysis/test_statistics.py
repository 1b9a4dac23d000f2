"""Numbers about curves, against scipy, numpy and what is known of the curves."""

import numpy as np
import pytest
from scipy.stats import linregress, spearmanr

from dino.analysis.history import Floats, Series
from dino.analysis.statistics import grouped, outliers, rank_correlation, thinned, trend


def over_steps(values: Floats) -> Series:
    return Series(np.arange(1, len(values) + 1, dtype=float), values)


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_is_scipys(seed: int) -> None:
    first, second = np.random.default_rng(seed).integers(0, 8, (2, 40)).astype(float)
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)


def test_what_is_constant_has_no_rank_correlation() -> None:
    assert rank_correlation(np.ones(9), np.arange(9.0)) is None


@pytest.mark.parametrize(("slope", "moves"), [(-0.002, True), (0.002, True), (0.0, False)])
def test_a_trend_is_the_line_through_the_newest_third(slope: float, moves: bool) -> None:
    steps = np.arange(1.0, 901)
    values = 5 + slope * steps + np.random.default_rng(0).normal(0, 0.1, 900)
    values[:600] += 100  # what was before does not count
    found = trend(Series(steps, values))
    assert found is not None
    assert found.slope == pytest.approx(1000 * linregress(steps[600:], values[600:]).slope)
    assert found.moves == moves


def test_few_values_have_no_trend() -> None:
    assert trend(over_steps(np.arange(9.0))) is None


def test_outliers_are_found_above_noise_and_above_a_slope() -> None:
    values = np.linspace(5, 1, 500) + np.random.default_rng(0).normal(0, 0.05, 500)
    values[[100, 400]] += 3
    assert outliers(values, deviations=10, at_least=0.5) == [100, 400]
    assert outliers(-values, deviations=10, at_least=0.5) == [], "only what rises"
    assert outliers(values[:5], deviations=10, at_least=0.5) == [], "too few to say what is usual"


def test_a_step_to_another_level_is_no_outlier() -> None:
    values = np.repeat([1.0, 3.0], 250) + np.random.default_rng(0).normal(0, 0.05, 500)
    assert outliers(values, deviations=10, at_least=0.5) == []


def test_neighbouring_outliers_are_one() -> None:
    assert grouped([3, 4, 6, 20, 21]) == [[3, 4, 6], [20, 21]]


@pytest.mark.parametrize("count", [1, 399, 400, 401, 1000, 12345])
def test_thinned_curves_keep_ends_spikes_and_gaps(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    if count > 700:
        values[[313, 707]] = 50, -50
        values[500] = np.nan
    series = thinned(over_steps(values), 400)
    assert len(series) <= 401
    assert series.steps[[0, -1]].tolist() == [1, count]
    assert (np.diff(series.steps) > 0).all()
    if count <= 400:
        assert series.values.tolist() == values.tolist()
    else:
        assert np.nanmax(series.values) == np.nanmax(values)
        assert np.nanmin(series.values) == np.nanmin(values)
        assert np.isnan(series.values).any() == np.isnan(values).any()
