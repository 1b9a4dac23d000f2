"""One family of schedules: a warm-up, then a shape; `schedule(step)` is what optimizer step `step` trains with.

Pure Python in float64, so that a value depends on the step alone and is the same on every machine. Equal to the arrays
of the original (utils.py, cosine_scheduler; main_dino.py, DINOLoss.teacher_temp_schedule), quirks included: the warm-up
holds both of its ends, so the first learning rate is `warmup_start` and `base` comes twice, and what follows is n
points of a curve that would reach `final` at point n, so the last value is just before it.

A schedule counts in units: optimizer steps, or whole epochs with `per="epoch"` (the original's teacher temperature).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

Domain = Literal["non_negative", "positive", "unit"]
_DOMAINS = {"non_negative": "0 or more", "positive": "above 0", "unit": "from 0 to 1"}


def scaled_lr(lr: float, effective_batch: int, reference_batch: int = 256) -> float:
    """The learning rate of a batch of `effective_batch` images, given that of `reference_batch` (main_dino.py).

    The effective batch counts all images of one optimizer step: micro-batches and ranks.
    """
    return lr * effective_batch / reference_batch


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """A quantity that moves during training; subclasses say how.

    Args:
        base: the value after the warm-up.
        epochs: length of the run.
        steps_per_epoch: optimizer steps in an epoch.
        warmup_start: the first value, where there is a warm-up.
        warmup: its shape; `cosine` starts and ends flat.
        per: whether the value changes every step or every epoch.
        domain: which values make sense: `non_negative`, `positive` (a temperature) or `unit` (a momentum, 0 to 1).
        name: how errors call it, as the config does: `schedule.lr`.

    Raises:
        ValueError: for a value outside of its range, and for a warm-up that is longer than the run.
    """

    base: float
    epochs: int
    steps_per_epoch: int
    warmup_start: float = 0.0
    warmup: Literal["linear", "cosine"] = "linear"
    per: Literal["step", "epoch"] = "step"
    domain: Domain = "non_negative"
    name: str = "schedule"

    def __post_init__(self) -> None:
        for key in ("epochs", "steps_per_epoch"):
            self._require(key, getattr(self, key) >= 1, "a whole number of at least 1")
        self._require_option("warmup", ("linear", "cosine"))
        self._require_option("per", ("step", "epoch"))
        self._require_option("domain", tuple(_DOMAINS))
        self._require_in_domain("base", self.base)
        if self.warmup_length > 0:
            self._require_in_domain("warmup_start", self.warmup_start)

    def __call__(self, step: int) -> float:
        """The value at optimizer step `step`, from 0; steps beyond the end keep the last value."""
        assert step >= 0, f"step {step} is before the start"
        unit = min(self._unit(step), self.length - 1)
        if unit < self.warmup_length:
            return self._warm_up(unit)
        return self._after(unit - self.warmup_length, self.length - self.warmup_length)

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def length(self) -> int:
        """Of the run, in units."""
        return self.total_steps if self.per == "step" else self.epochs

    @property
    @abstractmethod
    def warmup_length(self) -> int:
        """Of the warm-up, in units."""

    def rises(self) -> list[int]:
        """The steps at which a rise (or a warm-up that falls) has come to its end: those of the curve's corners."""
        if self.warmup_length < 2 or self.warmup_start == self.base:
            return []
        return [(self.warmup_length - 1) * (1 if self.per == "step" else self.steps_per_epoch)]

    @abstractmethod
    def _after(self, position: int, count: int) -> float:
        """The value at `position` of the `count` units that follow the warm-up, counted from 0."""

    def _unit(self, step: int) -> int:
        return step if self.per == "step" else step // self.steps_per_epoch

    def _warm_up(self, unit: int) -> float:
        """Point `unit` of `warmup_length` points from `warmup_start` to `base`, both included."""
        last = self.warmup_length - 1
        if unit == 0:
            return self.warmup_start
        if unit == last:
            return self.base
        share = unit / last if self.warmup == "linear" else (1 - math.cos(math.pi * unit / last)) / 2
        return self.warmup_start + (self.base - self.warmup_start) * share

    def _require(self, key: str, holds: bool, right: str) -> None:
        if not holds:
            raise ValueError(f"{self.name}.{key}={getattr(self, key)}: use {right}")

    def _require_option(self, key: str, options: tuple[str, ...]) -> None:
        self._require(key, getattr(self, key) in options, " or ".join(options))

    def _require_in_domain(self, key: str, value: float) -> None:
        low = value > 0 if self.domain == "positive" else value >= 0
        high = value <= 1 if self.domain == "unit" else value < math.inf
        self._require(key, low and high, f"a number {_DOMAINS[self.domain]}")


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """`base` throughout, after a warm-up of `warmup_epochs` (a fraction is rounded to whole units).

    With `per="epoch"` it is the original's teacher temperature (main_dino.py, DINOLoss).
    """

    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        self._require("warmup_epochs", 0 <= self.warmup_epochs < math.inf, "0 or more epochs")
        super().__post_init__()
        if self.warmup_length > self.length:
            raise ValueError(
                f"{self.name}.warmup_epochs={self.warmup_epochs:g} is longer than the run of {self.epochs} epochs: "
                f"use at most {self.epochs}"
            )

    @property
    def warmup_length(self) -> int:
        return round(self.warmup_epochs * (self.steps_per_epoch if self.per == "step" else 1))

    def _after(self, position: int, count: int) -> float:
        return self.base


@dataclass(frozen=True, kw_only=True)
class _Moving(Constant):
    """From `base` after the warm-up towards `final`; `_share` is how much of that way is still to go."""

    final: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_in_domain("final", self.final)

    def _after(self, position: int, count: int) -> float:
        return self.final + (self.base - self.final) * self._share(position, count)

    @abstractmethod
    def _share(self, position: int, count: int) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Cosine(_Moving):
    """Half a cosine wave from `base` to `final` (utils.py, cosine_scheduler)."""

    def _share(self, position: int, count: int) -> float:
        return _half_wave(position, count)


@dataclass(frozen=True, kw_only=True)
class Linear(_Moving):
    """A straight line from `base` to `final`."""

    def _share(self, position: int, count: int) -> float:
        return 1 - position / count


@dataclass(frozen=True, kw_only=True)
class Polynomial(_Moving):
    """`final + (base - final) * (1 - x) ** power` over the share x of the way; power 1 is `Linear`."""

    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("power", 0 < self.power < math.inf, "a number above 0")

    def _share(self, position: int, count: int) -> float:
        return math.pow(1 - position / count, self.power)


@dataclass(frozen=True, kw_only=True)
class CosineRestarts(_Moving):
    """`num_cycles` equal half cosine waves; each starts at `decay` times the height above `final` of the one before.

    Loshchilov & Hutter 2017 (SGDR) with cycles of one length; the decay is an addition.
    """

    num_cycles: int = 4
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("num_cycles", self.num_cycles >= 1, "a whole number of at least 1")
        self._require("decay", 0 < self.decay <= 1, "a number above 0 and at most 1")

    def _share(self, position: int, count: int) -> float:
        cycle, within = divmod(position * self.num_cycles, count)
        return math.pow(self.decay, cycle) * _half_wave(within, count)

    def rises(self) -> list[int]:
        count, per_unit = self.length - self.warmup_length, 1 if self.per == "step" else self.steps_per_epoch
        restarts = [self.warmup_length - (-count * cycle // self.num_cycles) for cycle in range(1, self.num_cycles)]
        return super().rises() + [restart * per_unit for restart in restarts]


@dataclass(frozen=True, kw_only=True)
class ThreePhase(Schedule):
    """A warm-up, half a cosine wave from `base` to `final`, then `final`; each a share of the run.

    By default 10 %, 70 % and the rest.
    """

    final: float
    warmup_fraction: float = 0.1
    cosine_fraction: float = 0.7

    def __post_init__(self) -> None:
        for key in ("warmup_fraction", "cosine_fraction"):
            self._require(key, 0 <= getattr(self, key) <= 1, "a number from 0 to 1")
        if self.warmup_fraction + self.cosine_fraction > 1 + 1e-9:
            raise ValueError(
                f"{self.name}.cosine_fraction={self.cosine_fraction} with a warmup_fraction of {self.warmup_fraction} "
                f"is more than the whole run: use a cosine_fraction of at most {1 - self.warmup_fraction:g}"
            )
        super().__post_init__()
        self._require_in_domain("final", self.final)

    @property
    def warmup_length(self) -> int:
        return round(self.warmup_fraction * self.length)

    def _after(self, position: int, count: int) -> float:
        wave = min(round(self.cosine_fraction * self.length), count)
        if position >= wave:
            return self.final
        return self.final + (self.base - self.final) * _half_wave(position, wave)


def _half_wave(position: int, count: int) -> float:
    """1 at position 0, falling to 0 at position `count`."""
    return (1 + math.cos(math.pi * position / count)) / 2
