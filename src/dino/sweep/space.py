"""Axes as the space of a search: the distributions that Hydra's own Optuna sweeper makes of the same lines."""

from collections.abc import Sequence

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from dino.messages import ConfigError
from dino.sweep.plan import Axis


def space_of(axes: Sequence[Axis]) -> dict[str, BaseDistribution]:
    """Key -> what may be chosen for it.

    A range includes its stop, if the steps lead there, and an interval both of its ends; whole numbers are chosen if
    both ends are (`int(interval(1,9))`); `tag(log,...)` is uniform in the logarithm; the order of a list means nothing.

    Raises:
        ConfigError: for an axis without a choice.
    """
    space: dict[str, BaseDistribution] = {}
    problems: list[str] = []
    for axis in axes:
        try:
            space[axis.override.get_key_element()] = _distribution(axis)
        except ValueError as error:
            problems.append(f"{axis.line}: {error}")
    if problems:
        raise ConfigError(problems)
    return space


def _distribution(axis: Axis) -> BaseDistribution:
    value = axis.override.value()
    if isinstance(value, IntervalSweep):
        return _between(value.start, value.end, log="log" in value.tags)
    if isinstance(value, RangeSweep) and not value.shuffle:
        return _steps(value)
    if isinstance(value, RangeSweep | ChoiceSweep):
        value.shuffle = False  # the same list each time that the search is resumed
        return CategoricalDistribution(list(axis.override.sweep_string_iterator()))
    return CategoricalDistribution([axis.override.get_value_element_as_str()])


def _between(low: float | None, high: float | None, *, log: bool) -> BaseDistribution:
    assert low is not None
    assert high is not None
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)


def _steps(value: RangeSweep) -> BaseDistribution:
    start, stop, step = value.start or 0, value.stop, value.step
    assert stop is not None
    if any(isinstance(number, float) for number in (start, stop, step)):
        return FloatDistribution(start, stop, step=step)
    return IntDistribution(int(start), int(stop), step=int(step))
