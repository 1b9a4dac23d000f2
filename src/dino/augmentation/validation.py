"""Checks of augmentation settings; every message names the key, the value and what would be right."""

from collections.abc import Sequence
from numbers import Real
from typing import Any


def check_choice(key: str, value: Any, choices: Sequence[str]) -> None:
    _require(value in choices, key, value, f"one of {', '.join(choices)}")


def check_count(key: str, value: Any, smallest: int) -> None:
    right = isinstance(value, int) and not isinstance(value, bool) and value >= smallest
    _require(right, key, value, f"a whole number of at least {smallest}")


def check_number(key: str, value: Any, low: float, high: float) -> None:
    bounds = f"a number of at least {low:g}" if high == float("inf") else f"a number between {low:g} and {high:g}"
    _require(_is_number(value) and low <= value <= high, key, value, bounds)


def check_probability(key: str, value: Any) -> None:
    _require(_is_number(value) and 0 <= value <= 1, key, value, "a probability between 0 and 1")


def check_probabilities(key: str, value: Any, names: Sequence[str]) -> None:
    right = _is_list(value, len(names)) and all(0 <= element <= 1 for element in value)
    _require(right, key, value, f"a list of {len(names)} probabilities between 0 and 1: [{', '.join(names)}]")


def check_range(key: str, value: Any, high: float = float("inf")) -> None:
    """A pair of numbers, above 0 and in order."""
    right = _is_list(value, 2) and 0 < value[0] <= value[1] <= high
    top = "" if high == float("inf") else f" <= {high:g}"
    _require(right, key, value, f"a list [smallest, largest] with 0 < smallest <= largest{top}")


def check_per_channel(key: str, value: Any, num_channels: int, *, positive: bool) -> None:
    right = _is_list(value, num_channels) and (not positive or all(element > 0 for element in value))
    what = "numbers above 0" if positive else "numbers"
    _require(right, key, value, f"a list of {num_channels} {what}, one for each channel, for pixels between 0 and 1")


def _require(right: bool, key: str, value: Any, expected: str) -> None:
    if not right:
        raise ValueError(f"augmentation.{key} is {value!r}; it must be {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and float(value) == float(value)


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == length and all(_is_number(element) for element in value)
