"""`dino results`: one table over all runs below a folder."""

import contextlib
import csv
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino.analysis.history import MARKS_OF_A_RUN, History
from dino.analysis.origin import PLACES, differing
from dino.messages import did_you_mean, show
from dino.monitor.early_stopping import higher_is_better

# Shown where some run has them; `dino evaluate` adds its own.
METRICS = ("val/knn_top1", "val/linear_top1", "val/effective_rank", "val/loss", "train/loss", "perf/images_per_s")
FACTS = ("run", "state", "step", "time_s")


@dataclass(frozen=True)
class _Run:
    """What is kept of a run: of all its lines only the last values."""

    facts: dict[str, Any]
    settings: dict[str, Any]
    typed: dict[str, str]  # what was said at the command line
    metrics: dict[str, float | None]
    evaluated: frozenset[str]  # the metrics that `dino evaluate` found

    @classmethod
    def read(cls, directory: Path, folder: Path) -> "_Run":
        history = History.load(directory)
        facts = {"state": history.state, "step": history.step, "time_s": history.train_time_s}
        logged, more = {name: history.last(name) for name in history.names}, _evaluated(history)
        name = str(directory.relative_to(folder))
        words = (word.lstrip("+").partition("=") for word in history.overrides if not word.startswith("~"))
        typed = {key: value for key, _, value in words}
        return cls({"run": name, **facts}, history.settings, typed, {**logged, **more}, frozenset(more))


@dataclass(frozen=True)
class Results:
    """Columns and one row a run; what a run does not have is None.

    Columns are `FACTS`, then the settings in which the runs differ, then metrics.
    """

    settings: list[str]  # those that somebody typed for one of the runs come first
    metrics: list[str]
    rows: list[dict[str, Any]]
    by_importance: list[str]  # all columns

    @property
    def columns(self) -> list[str]:
        return [*FACTS, *self.settings, *self.metrics]

    def abridged(self, count: int) -> list[str]:
        """The `count` most important columns, in their order."""
        chosen = self.by_importance[:count]
        return [name for name in self.columns if name in chosen]

    def write_csv(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            for row in self.rows:
                values = [row.get(name) for name in self.columns]
                writer.writerow([show(value) if isinstance(value, list | dict) else value for value in values])


def collect_results(folder: Path, metrics: Sequence[str] = (), sort: str | None = None) -> Results:
    """What the files of all runs below `folder` say: last values, settings that differ, states.

    Args:
        metrics: in place of `METRICS`.
        sort: a column; metrics begin with the better end, everything else with the small one. None: by path.

    Raises:
        ValueError: no run is there, or there is no such metric or column.
    """
    runs = [_Run.read(directory, folder) for directory in found_runs(folder)]
    if not runs:
        raise ValueError(f"{folder}: no run is in it; give a folder above run directories, such as outputs")
    known = {name for run in runs for name in run.metrics}
    for name in metrics:
        if name not in known:
            raise ValueError(f"--metric {name}: no run has it{did_you_mean(name, sorted(known))}")
    extra = sorted({name for run in runs for name in run.evaluated} - set(METRICS))
    first = list(metrics) or [name for name in METRICS if name in known]
    shown = first if metrics else [*first, *extra]
    settings = _settings(runs)
    rows = []
    for place, run in enumerate(runs):
        own = {key: column[place] for key, column in settings.items()}
        rows.append({**run.facts, **own, **{name: run.metrics.get(name) for name in shown}})
    order = dict.fromkeys(
        [*FACTS, *([sort] if sort else []), *first[:2], *list(settings)[:2], *first, *settings, *shown]
    )
    results = Results(list(settings), shown, rows, list(order))
    if sort is not None:
        if sort not in results.columns:
            hint = (
                did_you_mean(sort, results.columns)
                or f"; use the key of a setting or one of {', '.join([*FACTS, *first])}"
            )
            raise ValueError(f"--sort {sort}: there is no such column{hint}")
        _sort(rows, sort)
    return results


def _settings(runs: Sequence[_Run]) -> dict[str, list[object]]:
    """Settings, and choices of groups, in which runs differ: a value for each run. What was typed comes first."""
    columns = differing([run.settings for run in runs])
    typed: dict[str, list[object]] = {}
    for key in dict.fromkeys(key for run in runs for key in run.typed if key not in PLACES):
        chosen: list[object] = [run.typed.get(key) for run in runs]
        if key in columns:
            typed[key] = columns.pop(key)
        elif len(set(chosen)) > 1 and not any(key in run.settings for run in runs):
            typed[key] = chosen
    return typed | columns


def found_runs(folder: Path) -> list[Path]:
    """Run directories below `folder`, or itself, in the order of their paths; none inside another."""
    found = []
    for place, folders, files in os.walk(folder):
        if sum(name in files for name in MARKS_OF_A_RUN) >= 2:  # a sweep has a config.yaml alone
            found.append(Path(place))
            folders.clear()
        folders.sort()
    return sorted(found)


def _evaluated(history: History) -> dict[str, float]:
    """What `dino evaluate` found, the newest of each.

    What is not of the teacher at the end, on the run's own evaluation images, says so behind its name.
    """
    found: dict[str, float] = {}
    newest = max((line["step"] for line in history.lines if any(name.startswith("val/") for name in line)), default=0)
    for path in sorted(history.directory.glob("evaluation/step_*/results.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(path.read_text())
            words = path.parent.name.split("_")[2:]  # behind step_<number>
            words += [f"step {content['step']}"] if content["step"] < newest else []
            about = f" ({' '.join(words)})" if words else ""
            found |= {f"{name}{about}": value for name, value in content["metrics"].items()}
    return found


def _sort(rows: list[dict[str, Any]], name: str) -> None:
    """In place; rows without a value come last."""
    falling = bool(higher_is_better(name.split(" ")[0])) if "/" in name else False

    def place(row: dict[str, Any]) -> tuple[bool, Any]:
        value = row.get(name)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return True, 0
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False, (1, show(value))
        return False, (0, -value if falling else value)

    rows.sort(key=place)
