"""What a chart shows, whoever draws it: curves over optimizer steps by run, heat maps, and what happened meanwhile."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from dino.analysis.history import Event, Floats, History, Series, labels
from dino.analysis.statistics import thinned

MAX_POINTS = 400  # of a curve; fewer where many runs are drawn
MAX_MARKS = 12  # of one kind and run; their words are in every chart
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f4f24", "#555555")  # told apart by all
DASHES: tuple["Dash", ...] = ("solid", "dash", "dot", "dashdot")
GREY = "#888888"
STEP = "optimizer step"
SPELLED = {"knn": "k-NN", "top1": "top-1", "top5": "top-5", "kl": "KL", "koleo": "KoLeo", "grad": "gradient"}
FAINT = 0.45  # opacity

Dash = Literal["solid", "dash", "dot", "dashdot"]
MarkKind = Literal["severe", "verdict", "skipped", "expected"]

MARKS: dict["MarkKind", tuple[str, Dash, str]] = {  # kind -> colour, dash, name
    "severe": ("#c00000", "solid", "severe verdict"),
    "verdict": ("#e69f00", "solid", "verdict"),
    "skipped": ("#7b3294", "dash", "skipped step"),
    "expected": ("#888888", "dot", "the loss is expected to move"),
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line; `faint` where it is no measurement but what was planned or what to compare with."""

    label: str
    x: Sequence[float]
    y: Sequence[float]  # NaN leaves a gap
    colour: str
    dash: Dash = "solid"
    faint: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step."""

    step: int
    kind: MarkKind
    text: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over a common axis; `stacked` ones add up."""

    name: str
    title: str
    caption: str
    y: str
    curves: Sequence[Curve]
    x: str = STEP
    marks: Sequence[Mark] = ()
    log: bool = False
    log_x: bool = False
    stacked: bool = False


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Colours over columns and named rows; `symmetric` around 0, as correlations are."""

    name: str
    title: str
    caption: str
    x: str
    columns: Sequence[float] | Sequence[str]
    rows: Sequence[str]
    values: Floats  # [rows, columns]
    unit: str
    marks: Sequence[Mark] = field(default=())
    symmetric: bool = False


Drawing = Chart | HeatMap


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which metrics a chart shows over steps.

    Attributes:
        references: metric -> its name, for metrics with one value for the whole run, drawn as level lines.
        untrained: a metric whose value at step 0 is drawn as one.
    """

    name: str
    title: str
    caption: str
    y: str
    metrics: Sequence[str]
    references: Mapping[str, str] = field(default_factory=dict)
    untrained: str | None = None
    log: bool = False


def chart_of(histories: Sequence[History], plan: Plan, extra: Sequence[Curve] = ()) -> Chart:
    """One run: a colour a metric; several: a colour a run, a dash a metric."""
    curves = [curve for place in range(len(histories)) for curve in _curves(histories, place, plan)]
    return Chart(
        name=plan.name,
        title=plan.title,
        caption=plan.caption,
        y=plan.y,
        curves=[*curves, *extra],
        marks=marks(histories),
        log=plan.log,
    )


def _curves(histories: Sequence[History], place: int, plan: Plan) -> list[Curve]:
    """Those of one of the runs."""
    history, several = histories[place], len(histories) > 1
    run = f"{labels(histories)[place]}: " if several else ""
    colour = COLOURS[place % len(COLOURS)]
    curves = []
    for index, metric in enumerate(plan.metrics):
        series = thinned(history.series(metric), points_a_curve(histories))
        if len(series) and several:
            label = f"{run}{short(metric)}" if len(plan.metrics) > 1 else run.removesuffix(": ")
            curves.append(curve(label, series, colour, DASHES[index % len(DASHES)]))
        elif len(series):
            curves.append(curve(short(metric), series, COLOURS[index % len(COLOURS)]))
    if not curves:
        return []
    grey = colour if several else GREY
    levels = {words: history.last(metric) for metric, words in plan.references.items()}
    if plan.untrained:
        levels["untrained"] = history.untrained(plan.untrained)
    for words, value in levels.items():
        if value is not None:
            level = Series(np.array([0.0, history.step]), np.array([value, value]))
            curves.append(curve(f"{run}{words}", level, grey, "dot" if words != "untrained" else "dash", True))
    return curves


def curve(label: str, series: Series, colour: str, dash: Dash = "solid", faint: bool = False) -> Curve:
    return Curve(label=label, x=series.steps.tolist(), y=series.values.tolist(), colour=colour, dash=dash, faint=faint)


def short(metric: str) -> str:
    """Without its group: `loss` of `train/loss`; `validation loss` of `val/loss`, which stands beside it."""
    group, _, name = metric.partition("/")
    words = " ".join(SPELLED.get(word, word) for word in name.removesuffix("_s").removesuffix("_gib").split("_"))
    return f"validation {words}" if group == "val" and name.startswith("loss") else words


def points_a_curve(histories: Sequence[History]) -> int:
    return max(MAX_POINTS // 4, MAX_POINTS * 2 // (1 + len(histories)))


def marks(histories: Sequence[History]) -> list[Mark]:
    """Verdicts, skipped steps, and the steps at which the loss was expected to move."""
    found = []
    for history, run in zip(histories, labels(histories), strict=True):
        prefix = f"{run}: " if len(histories) > 1 else ""
        by_kind: dict[MarkKind, list[Mark]] = {}
        for event in history.events:
            kind = _kind(event)
            if kind is not None:
                by_kind.setdefault(kind, []).append(Mark(event.step, kind, f"{prefix}step {event.step}: {event.text}"))
        found += [mark for each in by_kind.values() for mark in _spread(each)]
    return found


def _kind(event: Event) -> MarkKind | None:
    if event.name == "verdict":
        return "severe" if event.details.get("severe") else "verdict"
    kinds: dict[str, MarkKind] = {"expected_move": "expected", "skipped_step": "skipped"}
    return kinds.get(event.name)


def _spread(each: Sequence[Mark]) -> list[Mark]:
    """The first, the last, and evenly many between."""
    places = np.unique(np.linspace(0, len(each) - 1, min(len(each), MAX_MARKS)).round().astype(int))
    return [each[place] for place in places]
