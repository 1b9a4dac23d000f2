"""What a sweep varies: from axes, as one would type them behind `-m`, to the overrides of every point."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.types import Glob, IntervalSweep, Override, QuotedString

from dino.messages import ConfigError, show
from dino.overrides import parsed
from dino.sweep.pruning import Pruning

MAX_DRAWS = 100  # of a random search for each of its points, since most may be known


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """An option of conf/sweep; its comments there say what each setting is.

    Raises:
        ConfigError: for settings that cannot be, naming the key.
    """

    name: str
    dir: str
    base: list[str] = field(default_factory=list)
    axes: list[str] = field(default_factory=list)
    zipped: list[list[str]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    metric: str = "val/knn_top1"
    direction: str = "maximize"
    on_failure: str = "continue"
    search: str = "grid"
    num_trials: int | None = None
    search_seed: int = 0
    max_parallel: int | None = None
    pruning: Pruning = field(default_factory=Pruning)

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ConfigError(problems)

    def _problems(self) -> Iterator[str]:
        if not self.name or "/" in self.name:
            yield f"sweep.name={self.name}: use a word without a slash; sweep.dir says where the sweep lies"
        if not self.dir:
            yield "sweep.dir: the path of a new folder is needed"
        word, colon, times = self.on_failure.partition(":")
        if not (self.on_failure in ("continue", "stop") or (word == "retry" and colon and times.isdecimal())):
            yield f"sweep.on_failure={self.on_failure}: use continue, stop or retry:k, such as retry:2"
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            yield f"sweep.seeds={show(self.seeds)}: list different whole numbers"
        if self.search != "grid" and self.num_trials is None:
            yield f"sweep.search={self.search}: say how many points it may choose, such as sweep.num_trials=20"
        if self.search == "grid" and self.num_trials is not None:
            yield "sweep.num_trials: a grid has all its points; use sweep.search=random, or leave it out"
        if self.search == "optuna" and len(self.seeds) > 1:
            yield f"sweep.seeds={show(self.seeds)}: sweep.search=optuna takes one seed; repeat what is best with others"
        if self.search != "optuna" and self.pruning.pruner is not None:
            yield f"sweep.pruning.pruner={self.pruning.pruner}: only sweep.search=optuna ends trials early"
        if self.search == "optuna" and self.zipped:
            yield "sweep.zipped: sweep.search=optuna takes axes only"


@dataclass(frozen=True)
class Point:
    """Overrides that make a trial what it is, and the swept values among them, by key."""

    overrides: tuple[str, ...]
    settings: dict[str, Any]
    seed: int


@dataclass(frozen=True)
class Axis:
    """One key and what it is varied over."""

    override: Override

    @property
    def key(self) -> str:
        return str(self.override.key_or_group)

    @property
    def line(self) -> str:
        return self.override.input_line or ""

    @property
    def is_interval(self) -> bool:
        return isinstance(self.override.value(), IntervalSweep)

    def assignments(self) -> list[str]:
        """`key=value` of every value, in order. Raises `ConfigError` for an interval, which has no end of them."""
        if self.is_interval:
            raise ConfigError([f"{self.line}: an interval is for sweep.search=random or optuna; a grid needs values"])
        if not self.override.is_sweep_override():
            return [self.line]
        return [f"{self.override.get_key_element()}={value}" for value in self.override.sweep_string_iterator()]

    def probes(self) -> list[str]:
        """`key=value` of both ends of an interval, or of all values."""
        interval = self.override.value()
        if isinstance(interval, IntervalSweep):
            return [f"{self.key}={interval.start}", f"{self.key}={interval.end}"]
        return self.assignments()

    def draw(self, generator: random.Random) -> str:
        """One `key=value`: uniform, for an interval tagged `log` uniform in its logarithm."""
        interval = self.override.value()
        if not isinstance(interval, IntervalSweep):
            return generator.choice(self.assignments())
        low, high = float(interval.start or 0), float(interval.end or 0)
        if "log" in interval.tags:
            value = math.exp(generator.uniform(math.log(low), math.log(high)))
        else:
            value = generator.uniform(low, high)
        whole = isinstance(interval.start, int) and isinstance(interval.end, int)
        return f"{self.key}={round(value) if whole else value}"


def axes_of(lines: Sequence[str]) -> list[Axis]:
    """Raises `ConfigError` for a line that is no `key=values`, and for a key that comes twice."""
    overrides, problems = parsed(lines)
    for override in overrides:
        line = override.input_line or ""
        if override.is_delete() or override.is_hydra_override():
            problems.append(f"{line}: this cannot be an axis; write key=a,b,c")
        interval = override.value()
        if isinstance(interval, Glob):
            problems.append(f"{line}: write the options themselves, as {override.key_or_group}=a,b,c")
        if isinstance(interval, IntervalSweep):
            low, high = float(interval.start or 0), float(interval.end or 0)
            if low >= high:
                problems.append(f"{line}: an interval goes from the smaller to the larger number")
            elif "log" in interval.tags and low <= 0:
                problems.append(f"{line}: a logarithmic interval starts above 0")
    keys = [str(override.key_or_group) for override in overrides]
    problems += [f"{key}: this axis is there twice" for key in sorted({key for key in keys if keys.count(key) > 1})]
    if "seed" in keys:
        problems.append("seed: not an axis; write sweep.seeds=[0,1,2], so that results are averaged over them")
    if problems:
        raise ConfigError(problems)
    return [Axis(override) for override in overrides]


def probes_of(sweep: Sweep) -> list[Point]:
    """What of a search can be checked ahead of it: each end or choice of an axis, with the first of the others.

    Raises:
        ConfigError: for axes that cannot be read, or none.
    """
    axes = axes_of(sweep.axes)
    if not axes:
        raise ConfigError(
            ["sweep.axes: a search needs something to vary, such as 'optimizer.lr=interval(0.0005,0.002)'"]
        )
    firsts = [axis.probes()[0] for axis in axes]
    chosen = [tuple(firsts)]
    for place, axis in enumerate(axes):
        chosen += [(*firsts[:place], other, *firsts[place + 1 :]) for other in axis.probes()[1:]]
    return [point_of(words, sweep.seeds[0]) for words in chosen]


def points_of(sweep: Sweep) -> list[Point]:
    """Every point of a grid or a random search, once for each seed, seeds innermost.

    Raises:
        ConfigError: for axes that cannot be read.
    """
    axes = axes_of(sweep.axes)
    together = [_zipped(group) for group in sweep.zipped]
    axes_of([*sweep.axes, *itertools.chain(*sweep.zipped)])  # no key twice
    if sweep.search == "random":
        chosen = _drawn(axes, together, sweep.num_trials or 0, random.Random(sweep.search_seed))
    else:
        chosen = list(itertools.product(*(axis.assignments() for axis in axes), *together))
    points = [tuple(itertools.chain(*((part,) if isinstance(part, str) else part for part in p))) for p in chosen]
    return [point_of(words, seed) for words in points for seed in sweep.seeds]


def _drawn(
    axes: Sequence[Axis], together: Sequence[list[tuple[str, ...]]], count: int, generator: random.Random
) -> list[tuple[str | tuple[str, ...], ...]]:
    """So many different points; fewer where hardly any others are left."""
    chosen: dict[tuple[str | tuple[str, ...], ...], None] = {}
    for _ in range(MAX_DRAWS * count):
        chosen[(*(axis.draw(generator) for axis in axes), *map(generator.choice, together))] = None
        if len(chosen) == count:
            break
    return list(chosen)


def point_of(assignments: Sequence[str], seed: int) -> Point:
    """The point of these `key=value`."""
    overrides, problems = parsed(assignments)
    if problems:
        raise ConfigError(problems)
    settings = {str(override.key_or_group): _plain(override.value()) for override in overrides}
    return Point((*assignments, f"seed={seed}"), settings, seed)


def _zipped(lines: Sequence[str]) -> list[tuple[str, ...]]:
    columns = [axis.assignments() for axis in axes_of(lines)]
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise ConfigError([f"sweep.zipped: {' and '.join(lines)} have {show(lengths)} values; they must be as many"])
    return list(zip(*columns, strict=True))


def _plain(value: Any) -> Any:
    return value.text if isinstance(value, QuotedString) else value
