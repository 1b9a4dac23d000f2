"""The table of `sweep.py status`."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from dino.messages import show
from dino.sweep.manifest import Manifest
from dino.sweep.states import BROKEN, FINISHED, RUNNING, TrialState

COLOURS = {FINISHED: "green", RUNNING: "cyan", **dict.fromkeys(BROKEN, "red")}


ROOMY = 100  # characters; in fewer the speed is left out


def status_table(manifest: Manifest, states: Mapping[str, TrialState], width: int) -> RenderableType:
    """One row a trial, then how many there are of each state, then why trials are not finished."""
    keys = list(dict.fromkeys(key for trial in manifest.trials for key in trial.settings))
    metric = manifest.sweep["metric"]
    several_nodes = len({state.host for state in states.values() if state.host}) > 1
    restarted = any(state.restarts for state in states.values())
    with_speed = width >= ROOMY
    numbers = [*(["images/s"] if with_speed else []), metric.rpartition("/")[2], *(["restarts"] if restarted else [])]
    table = Table(
        Column("trial", no_wrap=True),
        *(Column(short(key, keys), overflow="fold") for key in keys),
        "seed",
        Column("state", no_wrap=True),
        Column("step", no_wrap=True, justify="right"),
        *(Column(name, justify="right", overflow="fold") for name in numbers),
        *(["node"] if several_nodes else []),
        title=manifest.name,
        title_justify="left",
    )
    for state in states.values():
        trial = state.trial
        table.add_row(
            trial.id,
            *(_rounded(trial.settings.get(key, "")) for key in keys),
            str(trial.seed),
            Text(state.state, style=COLOURS.get(state.state, "yellow")),
            _step(state),
            *([_number(state.images_per_s, "{:,.0f}")] if with_speed else []),
            _number(state.metrics.get(metric), "{:.4g}"),
            *([str(state.restarts or "")] if restarted else []),
            *([state.host or ""] if several_nodes else []),
        )
    counts = Counter(state.state for state in states.values())
    totals = ", ".join(f"{count} {name}" for name, count in counts.items())
    reasons = [
        f"{state.trial.id} {state.state}: {state.traceback or state.reason}"
        for state in states.values()
        if state.reason and state.state not in (FINISHED, RUNNING)
    ]
    if any(state.held is None for state in states.values()):
        reasons.insert(0, "the cluster does not answer from here: this is what the files say")
    return Group(table, Text(totals), *(Text(line, overflow="fold") for line in reasons))


def short(key: str, keys: list[str]) -> str:
    """The last part of a dotted key where that says which it is."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def _step(state: TrialState) -> str:
    if state.step is None:
        return ""
    return f"{state.step}/{state.total_steps}" if state.total_steps else str(state.step)


def _rounded(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else show(value)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
