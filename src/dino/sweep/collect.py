"""What a sweep has found: trials, settings as mean and deviation over seeds, rankings, and the best; from files."""

import json
import math
import shlex
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dino.logger.json_lines import read_lines
from dino.messages import show
from dino.sweep.manifest import Manifest, Snapshot, Trial
from dino.sweep.states import FINISHED, TrialState

LOSS, EFFECTIVE_RANK = "train/loss", "val/effective_rank"
UNITS = {"knn": "%", "loss": "nats", "entropy": "nats", "kl_": "nats", "per_s": "images/s", "_gib": "GiB"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A trial and its numbers; a value that the run logged as not finite is NaN here.

    Attributes:
        last: metric -> its last value.
        curves: metric -> [(step, value)] of the metrics that are drawn.
        best: step and value of the best evaluation of the sweep's metric after step 0, the untrained network.
        train_time_s: of a finished run.
        snapshot: the code that it runs.
    """

    state: TrialState
    last: dict[str, float]
    curves: dict[str, list[tuple[int, float]]]
    best: tuple[int, float] | None
    train_time_s: float | None
    snapshot: Snapshot | None

    @property
    def trial(self) -> Trial:
        return self.state.trial

    @property
    def finished(self) -> bool:
        return self.state.state == FINISHED

    @property
    def command(self) -> str:
        """What runs the trial again, for a shell."""
        return shlex.join(["python", "train.py", *self.trial.overrides])


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (ddof = 1; None below 2 values) of n values."""

    n: int
    mean: float
    deviation: float | None

    def __str__(self) -> str:
        return number(self.mean) + ("" if self.deviation is None else f" ± {self.deviation:.2g}")


@dataclass(frozen=True)
class Setting:
    """One point of the sweep with all of its seeds."""

    values: dict[str, Any]
    rows: list[Row]

    def over_seeds(self, metric: str) -> Spread | None:
        """Over the last values of the finished trials: those of others were measured at other steps."""
        logged = [row.last[metric] for row in self.rows if row.finished and metric in row.last]
        found = [value for value in logged if math.isfinite(value)]
        if not found:
            return None
        return Spread(len(found), statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None)

    def num_missing(self, metric: str) -> int:
        """Seeds that were planned and have no value."""
        spread = self.over_seeds(metric)
        return len(self.rows) - (spread.n if spread else 0)

    def __str__(self) -> str:
        return ", ".join(f"{axis}={words(value)}" for axis, value in self.values.items()) or "the base settings"


@dataclass(frozen=True, kw_only=True)
class Results:
    """A sweep as far as it has come.

    Attributes:
        axes: swept keys, without the seed.
        rows: in the order of the manifest.
        settings: ordered by the values of their axes.
    """

    manifest: Manifest
    metric: str
    maximize: bool
    axes: list[str]
    rows: list[Row]
    settings: list[Setting]

    @cached_property
    def counts(self) -> dict[str, int]:
        """State -> number of trials."""
        return dict(Counter(row.state.state for row in self.rows))

    @cached_property
    def metrics(self) -> list[str]:
        """All metrics that any trial has."""
        return sorted({name for row in self.rows for name in row.last})

    @cached_property
    def averaged(self) -> list[str]:
        """Those of which settings have a mean, the important ones first."""
        evaluated = (name for name in self.metrics if name.startswith("val/"))
        return [name for name in dict.fromkeys((self.metric, EFFECTIVE_RANK, LOSS, *evaluated)) if name in self.metrics]

    @cached_property
    def rankings(self) -> dict[str, list[Setting]]:
        """Metric -> settings that have it, best first: by the sweep's metric, and by effective rank, without labels."""
        names = [self.metric, *([EFFECTIVE_RANK] if self.metric != EFFECTIVE_RANK else [])]
        rankings = {name: self._ranked(name, self.maximize or name != self.metric) for name in names}
        return {name: ranked for name, ranked in rankings.items() if ranked}

    def _ranked(self, metric: str, maximize: bool) -> list[Setting]:
        means = [(spread.mean, setting) for setting in self.settings if (spread := setting.over_seeds(metric))]
        return [setting for _, setting in sorted(means, key=lambda pair: pair[0], reverse=maximize)]

    @cached_property
    def rank_correlation(self) -> float | None:
        """Spearman's, of the two rankings with the best of each first; None below 3 settings or where all are equal."""
        both = [(setting.over_seeds(self.metric), setting.over_seeds(EFFECTIVE_RANK)) for setting in self.settings]
        pairs = [(one.mean if self.maximize else -one.mean, other.mean) for one, other in both if one and other]
        if len(pairs) < 3 or self.metric == EFFECTIVE_RANK:
            return None
        try:
            return statistics.correlation(*(_ranks(column) for column in zip(*pairs, strict=True)))
        except statistics.StatisticsError:  # one of the two is constant
            return None

    @property
    def best(self) -> Setting | None:
        """The setting with the best mean; None where no finished trial has the metric."""
        return self.rankings[self.metric][0] if self.metric in self.rankings else None

    @property
    def best_row(self) -> Row | None:
        """The best trial of the best setting."""
        if self.best is None:
            return None
        rows = [row for row in self.best.rows if row.finished and math.isfinite(row.last.get(self.metric, math.nan))]
        return (max if self.maximize else min)(rows, key=lambda row: row.last[self.metric])

    @property
    def summary(self) -> str:
        """One sentence on the trials, and one on the best of them."""
        states = ", ".join(f"{count} {state}" for state, count in sorted(self.counts.items()))
        trials = f"{plural(len(self.rows), 'trial')} of {plural(len(self.settings), 'setting')}: {states or 'none'}."
        if self.best is None:
            known = [name for name in self.metrics if name.startswith("val/")]
            others = f"; there are {', '.join(known)}" if known and self.metric not in known else ""
            return f"{trials} No finished trial has {self.metric} yet{others}."
        spread = self.best.over_seeds(self.metric)
        assert spread is not None
        seeds = plural(spread.n, "seed")
        return f"{trials} Best {with_unit(self.metric)}: {spread} ({seeds}) with {self.best}."


def collect(manifest: Manifest, states: Mapping[str, TrialState]) -> Results:
    """Reads what the trials have written so far; nothing is written."""
    metric, maximize = manifest.sweep["metric"], manifest.sweep["direction"] == "maximize"
    rows = [_row(manifest, states[trial.id], metric, maximize) for trial in manifest.trials]
    grouped: dict[str, Setting] = {}
    for row in rows:
        grouped.setdefault(repr(sorted(row.trial.settings.items())), Setting(row.trial.settings, [])).rows.append(row)
    axes = list(dict.fromkeys(axis for trial in manifest.trials for axis in trial.settings))
    settings = sorted(grouped.values(), key=lambda setting: [order(setting.values.get(axis)) for axis in axes])
    return Results(manifest=manifest, metric=metric, maximize=maximize, axes=axes, rows=rows, settings=settings)


def _row(manifest: Manifest, state: TrialState, metric: str, maximize: bool) -> Row:
    path = state.directory / "metrics.jsonl"
    last: dict[str, float] = {}
    curves: dict[str, list[tuple[int, float]]] = {name: [] for name in dict.fromkeys((LOSS, metric, EFFECTIVE_RANK))}
    for line in read_lines(path) if path.exists() else []:
        values = {name: math.nan if value is None else value for name, value in line.items() if "/" in name}
        last |= values
        for name in curves.keys() & values.keys():
            curves[name].append((line["step"], values[name]))
    trained = [(step, value) for step, value in curves[metric] if step > 0 and math.isfinite(value)]
    submission = manifest.last_submission(state.trial)
    return Row(
        state=state,
        last=last,
        curves=curves,
        best=(max if maximize else min)(trained, key=lambda point: point[1], default=None),
        train_time_s=_train_time_s(state.directory) if state.state == FINISHED else None,
        snapshot=manifest.snapshots[submission.snapshot] if submission else None,
    )


def _train_time_s(directory: Path) -> float | None:
    try:
        seconds: float = json.loads((directory / "training_summary.json").read_text())["train_time_s"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return seconds


def _ranks(values: Sequence[float]) -> list[float]:
    """1 for the smallest; equal values share the mean of their ranks."""
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


# ---------------------------------------------------------------------- words and order


def order(value: Any) -> tuple[bool, float, str]:
    """Sorts values of an axis: numbers by size, then everything else by name."""
    return (False, value, "") if is_number(value) else (True, 0.0, show(value))


def words(value: Any) -> str:
    """A value of an axis as one would type it; one with many digits, which a search draws, with six of them."""
    text = show(value)
    return f"{value:.6g}" if isinstance(value, float) and len(text) > 12 else text


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: float | None) -> str:
    """Four digits; nothing for None."""
    return "" if value is None else "NaN" if math.isnan(value) else f"{value:.4g}"


def with_unit(metric: str) -> str:
    unit = next((unit for part, unit in UNITS.items() if part in metric), "s" if metric.endswith("_s") else None)
    return f"{metric} [{unit}]" if unit else metric


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
