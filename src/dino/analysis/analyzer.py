"""What a run's history says in words: state, whether it learns, what stands out, how healthy it is, what to change."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dino.analysis.anomalies import Anomaly, anomalies
from dino.analysis.correlations import Correlation, correlations
from dino.analysis.history import History
from dino.analysis.recommendations import recommendations
from dino.analysis.score import Deduction, deductions
from dino.analysis.statistics import Trend, trend
from dino.analysis.verdicts import Verdict, verdicts
from dino.exits import EXIT_COLLAPSED, EXIT_NON_FINITE
from dino.monitor import began_with_weights
from dino.monitor.advice import Recommendation

Learning = Literal["learns", "collapsed", "diverged", "does not learn", "not yet known"]
ANSWERS: dict[Learning, str] = {
    "learns": "It learns",
    "collapsed": "It has collapsed",
    "diverged": "It has diverged",
    "does not learn": "It does not learn",
    "not yet known": "Whether it learns is not yet known",
}

GRAVE: dict[Learning, tuple[str, ...]] = {  # what severe verdicts of these kinds make of a run
    "collapsed": ("uniform_collapse", "constant_collapse", "entropy_collapse", "center_explosion"),
    "diverged": ("loss_explosion",),
}
QUALITY = {  # metric -> by how much it is better than the untrained network beyond noise; the first that is there tells
    "val/knn_top1": 2.0,
    "val/effective_rank_ratio": 0.02,
    "val/view_retrieval_top1": 2.0,
}
EARLY = 0.25  # share of the run before which no improvement means nothing
SUMMARISED = (
    "train/loss",
    "train/kl_teacher_student",
    "train/entropy_teacher",
    "train/entropy_batch_mean",
    "train/center_norm",
    "train/grad_norm",
    "val/knn_top1",
    "val/effective_rank_ratio",
    "val/feature_std",
    "val/view_retrieval_top1",
    "perf/images_per_s",
)
UNITS = {
    "loss": "nats",
    "entropy": "nats",
    "kl": "nats",
    "knn": "points",
    "view_retrieval": "points",
    "images": "images/s",
}


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """One metric over the run; `trend` is None where there are too few values."""

    name: str
    first: float
    last: float
    mean: float
    std: float
    min: float
    max: float
    trend: Trend | None

    @property
    def direction(self) -> str:
        """The trend of the newest third, in words."""
        if self.trend is None:
            return "too few values"
        if not self.trend.moves:
            return "level"
        words = [f"{abs(self.trend.slope):.3g}", *(unit for part, unit in UNITS.items() if f"/{part}" in self.name)]
        return f"{'rises' if self.trend.slope > 0 else 'falls'} by {' '.join(words)} per 1000 steps"


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Everything there is to say about one run.

    Attributes:
        state: what has become of the run, one sentence.
        learning: the answer to the first question, and `because` its evidence.
        headline: name -> number in words, those worth reading first.
        score: health from 0 to 1; None before anything was logged. 1 less all deductions.
    """

    history: History
    state: str
    learning: Learning
    because: str
    headline: dict[str, str]
    verdicts: list[Verdict]
    statistics: list[Statistic]
    correlations: list[Correlation]
    anomalies: list[Anomaly]
    score: float | None
    deductions: list[Deduction]
    recommendations: list[Recommendation]

    @property
    def answer(self) -> str:
        """To the first question."""
        return ANSWERS[self.learning]


def analyse(history: History) -> Analysis:
    """Reads nothing but the history; a run that has only begun gives a short analysis."""
    found, raised = anomalies(history), verdicts(history)
    learning, because = _learning(history, raised)
    kinds = [*(verdict.kind for verdict in raised), *(anomaly.kind for anomaly in found)]
    kinds += ["no_improvement"] if learning == "does not learn" else []
    lost = deductions(history, raised, found, learned=learning == "learns", early=_is_early(history))
    return Analysis(
        history=history,
        state=_state(history),
        learning=learning,
        because=because,
        headline=_headline(history),
        verdicts=raised,
        statistics=[_statistic(history, name) for name in SUMMARISED if len(history.series(name).finite)],
        correlations=correlations(history),
        anomalies=found,
        score=None if learning == "not yet known" and not lost else max(0.0, round(1 - sum(e.points for e in lost), 2)),
        deductions=lost,
        recommendations=recommendations(history, kinds),
    )


def _state(history: History) -> str:
    place = f"step {history.step}" + (f" of {history.total_steps}" if history.total_steps else "")
    reason = f": {history.status['reason']}" if history.status.get("reason") else ""
    saved = any((history.directory / "checkpoints").glob("step_*.pt"))
    again = f"The same command {'goes on from its newest checkpoint' if saved else 'begins anew: nothing was saved'}."
    sentences = {
        "created": "It has not begun yet.",
        "running": f"It is running, at {place}.",
        "died": f"It died without a word at {place}: killed, or the machine went down. {again}",
        "preempted": f"It was preempted at {place}{reason}. {again}",
        "finished": f"It has finished at {place}{reason}.",
        "failed": f"It failed at {place}{reason}{_where_more(history)}.",
    }
    return sentences.get(history.state, f"Its files do not say what has become of it; it came to {place}.")


def _where_more(history: History) -> str:
    return "" if history.status.get("exit_code") == EXIT_COLLAPSED else "; train.log has the traceback"


def _is_early(history: History) -> bool:
    """Whether it is too soon to expect anything."""
    total = history.total_steps
    return history.state != "finished" and (total is None or history.step < EARLY * total)


def _learning(history: History, raised: Sequence[Verdict]) -> tuple[Learning, str]:
    if history.status.get("exit_code") == EXIT_NON_FINITE:
        return "diverged", "too many steps had a loss or gradient that was not finite"
    metric = quality_metric(history)
    measured = history.series(metric).finite.trained if metric else None
    better = metric is not None and is_better(history, metric)
    evidence = f"{_label(metric)} {_against_untrained(history, metric)}" if metric and measured else ""
    for word, kinds in GRAVE.items():
        grave = [verdict for verdict in raised if verdict.severe and verdict.kind in kinds]
        newest = max(grave, key=lambda verdict: verdict.last_step, default=None)
        if newest and not (better and measured and measured.steps[-1] > newest.last_step):
            return word, f"{newest.title}, {newest.when}"
    if metric is None or not measured:
        return "not yet known", _why_unknown(history)
    if better:
        return "learns", evidence
    return ("not yet known", f"{evidence}; it is early") if _is_early(history) else ("does not learn", evidence)


def _why_unknown(history: History) -> str:
    if not history.lines:
        return "nothing is logged yet"
    if history.config.get("evaluation") == {}:
        return "evaluation=[] measures nothing but the loss"
    return "no evaluation of the trained network yet"


def quality_metric(history: History) -> str | None:
    """The metric that tells whether it learns: k-NN where there are labels."""
    known = (name for name in QUALITY if history.untrained(name) is not None)
    return next((name for name in known if len(history.series(name).finite.trained)), None)


def is_better(history: History, metric: str) -> bool:
    """Whether the newest value is above that of the untrained network by more than noise."""
    before, now = history.untrained(metric), history.last(metric)
    return before is not None and now is not None and now - before > QUALITY[metric]


def _statistic(history: History, name: str) -> Statistic:
    series = history.series(name).finite
    values = series.values
    return Statistic(
        name=name,
        first=float(values[0]),
        last=float(values[-1]),
        mean=float(values.mean()),
        std=float(values.std()),
        min=float(values.min()),
        max=float(values.max()),
        trend=trend(series.trained),
    )


# ---------------------------------------------------------------------- words


def _headline(history: History) -> dict[str, str]:
    lines = {}
    for name in QUALITY:
        if len(history.series(name).finite):
            lines[_label(name)] = _against_untrained(history, name)
    pixels = history.last("val/knn_top1_pixels")
    if pixels is not None and _label("val/knn_top1") in lines:
        lines[_label("val/knn_top1")] += f"; raw pixels {pixels:.1f} %"
    loss, uniform = history.last("train/loss"), history.last("train/loss_uniform")
    if loss is not None:
        lines["Loss"] = f"{loss:.3f}" + (f" ({100 * loss / uniform:.0f} % of ln K = {uniform:.2f})" if uniform else "")
    speed = history.series("perf/images_per_s").finite.values
    if len(speed):
        lines["Speed"] = f"{sorted(speed)[len(speed) // 2]:.4g} images/s"
    return lines


def _label(metric: str | None) -> str:
    return {
        "val/knn_top1": "k-NN",
        "val/effective_rank_ratio": "Effective rank, of what is attainable",
        "val/view_retrieval_top1": "View retrieval",
    }.get(metric or "", metric or "")


def _against_untrained(history: History, metric: str) -> str:
    """`95.0 % (untrained 46.7 %)`, and the best value where the newest one is not it."""

    def words(value: float) -> str:
        return f"{100 * value:.1f} %" if metric.endswith("_ratio") else f"{value:.1f} %"

    start = "loaded" if began_with_weights(history.settings) else "untrained"
    series, before = history.series(metric).finite, history.untrained(metric)
    now, best = float(series.values[-1]), float(max(series.trained.values, default=math.nan))
    if series.steps[-1] == 0:
        return f"{words(now)} {start}, not measured since"
    text = words(now)
    if before is not None:
        text += f" ({start} {words(before)}" + (f", best {words(best)})" if best > now else ")")
    return text
