"""All that a run directory says about its run, from files alone; the run may be over, going on, or have died."""

import contextlib
import json
import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import yaml

from dino.logger.json_lines import read_lines
from dino.presets import leaves
from dino.run import LOCK, read_status
from dino.sweep.locks import holder_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]
MARKS_OF_A_RUN = ("status.json", "metrics.jsonl", "config.yaml")
NOT_SETTINGS = ("fingerprint", "run_dir")  # of config.yaml: they say which run it is


@dataclass(frozen=True)
class Series:
    """The logged values of one metric, in the order of their steps.

    Attributes:
        steps: [n], whole numbers; epochs where it was asked for by epoch.
        values: [n], NaN where the value was not finite.
    """

    steps: Floats
    values: Floats

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> "Series":
        """Without the values that are not finite."""
        kept = np.isfinite(self.values)
        return Series(self.steps[kept], self.values[kept])

    @property
    def trained(self) -> "Series":
        """After step 0, which is the untrained network."""
        return Series(self.steps[self.steps > 0], self.values[self.steps > 0])


@dataclass(frozen=True)
class Event:
    """A line of `metrics.jsonl` that says what happened at a step; `details` holds its other keys."""

    step: int
    name: str
    text: str
    details: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class History:
    """A run as far as it has come.

    Attributes:
        config: what the run trains with, as nested dictionaries; empty where there is no readable `config.yaml`.
        overrides: as they were typed; empty for a trial of a sweep.
        status: `status.json`, with provenance.
        summary: `training_summary.json`; empty before the end.
        lines: those of `metrics.jsonl` that hold metrics; None for a value that was not finite.
        events: those that say what happened.
    """

    directory: Path
    config: dict[str, Any]
    overrides: list[str]
    status: dict[str, Any]
    summary: dict[str, Any]
    lines: list[dict[str, Any]]
    events: list[Event]
    _series: dict[str, Series] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, directory: Path) -> "History":
        """Reads the files; one that is missing or damaged counts as empty.

        Raises:
            ValueError: it is not the directory of a run.
        """
        directory = Path(directory)
        if not any((directory / name).is_file() for name in MARKS_OF_A_RUN):
            raise ValueError(
                f"{directory}: not the directory of a run, which holds status.json, config.yaml and metrics.jsonl; "
                "name one such as outputs/digits/DATE_TIME_ID"
            )
        path = directory / "metrics.jsonl"
        lines = [line for line in (read_lines(path) if path.is_file() else []) if _is_sound(line)]
        config = _yaml(directory / "config.yaml")
        overrides = _yaml(directory / ".hydra" / "overrides.yaml")
        return cls(
            directory=directory,
            config=config if isinstance(config, dict) else {},
            overrides=[str(line) for line in overrides] if isinstance(overrides, list) else [],
            status=read_status(directory),
            summary=_json(directory / "training_summary.json"),
            lines=[line for line in lines if "event" not in line],
            events=[_event(line) for line in lines if "event" in line],
        )

    # ------------------------------------------------------------------ metrics

    @cached_property
    def names(self) -> list[str]:
        """All metrics, such as `train/loss`, in the order in which they were first logged."""
        return list(dict.fromkeys(name for line in self.lines for name in line if "/" in name))

    def series(self, name: str, per: Literal["step", "epoch"] = "step") -> Series:
        """One metric over optimizer steps, or its mean over each epoch (0: the untrained network); empty if unknown."""
        if name not in self._series:
            logged = [(line["step"], line[name]) for line in self.lines if name in line]
            points = np.array([(step, math.nan if value is None else value) for step, value in logged], float)
            self._series[name] = Series(*points.reshape(-1, 2).T)
        series = self._series[name]
        if per == "step" or not len(series) or self.steps_per_epoch is None:
            return series
        epochs = np.ceil(series.steps / self.steps_per_epoch)
        unique = np.unique(epochs)
        return Series(unique, np.array([mean(series.values[epochs == epoch]) for epoch in unique]))

    def last(self, name: str) -> float | None:
        """The newest finite value."""
        values = self.series(name).finite.values
        return float(values[-1]) if len(values) else None

    def untrained(self, name: str) -> float | None:
        """The value of the untrained network, at step 0."""
        series = self.series(name).finite
        return float(series.values[0]) if len(series) and series.steps[0] == 0 else None

    def to_dataframe(self, per: Literal["step", "epoch"] = "step") -> "pd.DataFrame":
        """One row a logged step (or epoch), one column a metric; NaN where it was not logged or not finite."""
        import pandas as pd

        columns = {}
        for name in self.names:
            series = self.series(name, per)
            column = pd.Series(series.values, index=series.steps.astype(int))
            columns[name] = column[~column.index.duplicated(keep="last")]
        frame = pd.DataFrame(columns, columns=self.names)
        frame.index.name = per
        return frame.sort_index()

    def plot(self, *names: str) -> "Figure":
        """A matplotlib figure of some metrics over optimizer steps, with what happened marked; notebooks show it."""
        from dino.analysis.charts import Plan, chart_of
        from dino.analysis.png import draw

        return draw(chart_of([self], Plan(name="plot", title=", ".join(names), caption="", y="", metrics=names)))

    # ------------------------------------------------------------------ the run

    @property
    def name(self) -> str:
        """As the run is called beside others: the last part of its path."""
        return self.directory.resolve().name

    @cached_property
    def step(self) -> int:
        """The newest step that any file knows of."""
        return max([int(self.status.get("step") or 0), *(int(line["step"]) for line in self.lines)])

    @property
    def train_time_s(self) -> float | None:
        """Time of training [s]; before the end what lies between the first and the last logged line."""
        if "train_time_s" in self.summary:
            return float(self.summary["train_time_s"])
        times = [float(line["time"]) for line in self.lines if "time" in line]
        return times[-1] - times[0] if len(times) > 1 else None

    @property
    def total_steps(self) -> int | None:
        """At which the run is done; None before it has begun."""
        total = self.status.get("total_steps")
        return int(total) if total else None

    @cached_property
    def steps_per_epoch(self) -> int | None:
        """None before the first logged step."""
        line = next((line for line in reversed(self.lines) if line.get("epoch")), None)
        return round(line["step"] / line["epoch"]) if line else None

    @cached_property
    def state(self) -> str:
        """`created`, `running`, `preempted`, `finished`, `failed`, or `died`: it says running and is not."""
        state = str(self.status.get("state", "unknown"))
        return "died" if state == "running" and self._is_dead() else state

    def _is_dead(self) -> bool:
        """Only the machine on which it runs can tell. A process that closed its own lock file would let go of it."""
        if self.status.get("host") != socket.gethostname() or self.status.get("pid") == str(os.getpid()):
            return False
        try:
            return holder_of(self.directory / LOCK) is None
        except OSError:
            return False

    @property
    def settings(self) -> dict[str, Any]:
        """Dotted key -> value of everything that the run was told."""
        return leaves({key: value for key, value in self.config.items() if key not in NOT_SETTINGS})

    def named(self, name: str) -> list[Event]:
        """The events of this name."""
        return [event for event in self.events if event.name == name]


def labels(histories: Sequence[History]) -> list[str]:
    """What to call runs beside each other: their last part where that tells them apart, else their path."""
    names = [history.name for history in histories]
    return names if len(set(names)) == len(names) else [str(history.directory) for history in histories]


def _event(line: dict[str, Any]) -> Event:
    known = ("step", "epoch", "time", "event", "text")
    details = {key: value for key, value in line.items() if key not in known}
    return Event(line["step"], str(line["event"]), str(line.get("text", "")), details)


def mean(values: Floats) -> float:
    """Of the finite values; NaN where there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else {}
    return {}


def _yaml(path: Path) -> Any:
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        return yaml.safe_load(path.read_text())
    return None


def _is_sound(line: dict[str, Any]) -> bool:
    """Whether it is as a run writes it: all that is counted or drawn is a number, or null."""
    measured = {"epoch": line.get("epoch"), **{name: value for name, value in line.items() if "/" in name}}
    return isinstance(line.get("step"), int) and all(
        value is None or isinstance(value, int | float) for value in measured.values()
    )
