"""Which metrics move together over a run, and what that says about DINO."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dino.analysis.history import Floats, History, Series
from dino.analysis.statistics import at_same_steps, rank_correlation

MIN_STEPS = 10  # logged steps in common, of metrics of training
MIN_EVALUATIONS = 4  # in common, where one of the two is a metric of evaluation
STRONG = 0.5
MAX_NAMES = 24
ALIASES = ("train/loss_uniform", "train/teacher_half_life_samples")  # say nothing beside the others


@dataclass(frozen=True)
class Pair:
    """Two metrics that matter for DINO, and what it means when they rise together, apart, or neither."""

    first: str
    second: str
    together: str
    opposed: str
    neither: str


PAIRS = (
    Pair(
        "train/loss",
        "train/kl_teacher_student",
        "The loss moves with what the student has not learned yet.",
        "The loss moves against KL: the teacher's entropy moves it.",
        "The loss is moved by the teacher's entropy rather than by what the student learns.",
    ),
    Pair(
        "train/entropy_teacher",
        "train/teacher_temp",
        "A warmer teacher is a softer one, as it should be.",
        "The teacher grows sharper although its temperature rises: its logits grow apart faster.",
        "The teacher's entropy follows its network rather than its temperature.",
    ),
    Pair(
        "val/knn_top1",
        "val/effective_rank",
        "Richer features come with better k-NN: the effective rank can rank this run's checkpoints without labels.",
        "k-NN rises while the effective rank falls: do not choose a checkpoint by effective rank here.",
        "k-NN and effective rank say different things here: trust k-NN.",
    ),
    Pair(
        "val/knn_top1",
        "val/view_retrieval_top1",
        "View retrieval follows k-NN: it can rank this run's checkpoints without labels.",
        "k-NN rises while view retrieval falls: the features give up what tells images of a class apart.",
        "k-NN and view retrieval say different things here: trust k-NN.",
    ),
    Pair(
        "train/center_norm",
        "train/entropy_batch_mean",
        "The longer the center, the more evenly the batch spreads over prototypes: centering does its work.",
        "The longer the center, the less evenly the batch spreads over prototypes: usual while the teacher changes, "
        "a warning where neither settles.",
        "The center says nothing about how the batch spreads over prototypes.",
    ),
    Pair(
        "train/grad_norm",
        "train/loss",
        "Gradients shrink and grow with the loss.",
        "Gradients are the larger the lower the loss is, as they are with a student that becomes sharper.",
        "Gradients do not follow the loss.",
    ),
    Pair(
        "val/knn_top1",
        "train/loss",
        "k-NN rises with the loss: the loss is no measure of progress here.",
        "k-NN rises as the loss falls in this run; that need not hold in the next one.",
        "The loss does not tell how good the features are: go by k-NN.",
    ),
)


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of two metrics over `n` steps, in words."""

    first: str
    second: str
    value: float
    n: int
    text: str


def correlations(history: History) -> list[Correlation]:
    """Of the pairs that matter, those that have enough steps in common and both move."""
    found = []
    for pair in PAIRS:
        first, second = _together(history, pair.first, pair.second)
        evaluated = pair.first.startswith("val/")
        value = rank_correlation(first, second)
        if value is not None and len(first) >= (MIN_EVALUATIONS if evaluated else MIN_STEPS):
            text = pair.together if value >= STRONG else pair.opposed if value <= -STRONG else pair.neither
            found.append(Correlation(pair.first, pair.second, value, len(first), text))
    return found


def _together(history: History, first: str, second: str) -> tuple[Floats, Floats]:
    one, other = history.series(first), history.series(second)
    if first.startswith("val/") and not second.startswith("val/"):
        other = _at_evaluations(other, one.steps)
    return at_same_steps(one, other)


def _at_evaluations(series: Series, evaluations: Floats) -> Series:
    """The median of what was logged since the evaluation before: one step alone is noise."""
    bounds = pairwise([-1.0, *evaluations])
    values = [series.values[(series.steps > start) & (series.steps <= end)] for start, end in bounds]
    medians = [float(np.median(each[np.isfinite(each)])) if np.isfinite(each).any() else np.nan for each in values]
    return Series(evaluations, np.array(medians))


def matrix(history: History) -> tuple[list[str], Floats]:
    """The metrics of training that move, and the rank correlation of each with each: [n, n], NaN where unknown."""
    names = [name for name in history.names if name.startswith("train/") and name not in ALIASES]
    series = {name: history.series(name).finite for name in names}
    names = [name for name in names if len(series[name]) >= MIN_STEPS and np.ptp(series[name].values) > 0][:MAX_NAMES]
    values = np.full((len(names), len(names)), np.nan)
    for row, first in enumerate(names):
        for column, second in enumerate(names[: row + 1]):
            one, other = at_same_steps(series[first], series[second])
            value = rank_correlation(one, other) if len(one) >= MIN_STEPS else None
            values[row, column] = values[column, row] = np.nan if value is None else value
    return names, values
