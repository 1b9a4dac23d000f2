"""What stands out in the curves of a run, relative to the run itself; verdicts on health are the monitor's."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dino.analysis.history import History
from dino.analysis.statistics import MIN_POINTS, grouped, outliers

SPIKE_DEVIATIONS = 10.0  # robust standard deviations above the rolling median
LOSS_SPIKE_SHARE = 0.25  # of the loss around it, at least
GRADIENT_SPIKE_FACTOR = 10.0  # times the gradient norm around it, at least
CENTER_GROWTH = 10.0  # times the median of the first half
COLLAPSED_SHARE = 0.02  # of ln K
SLOW_FACTOR = 3.0  # times the median step
SLOW_SHARE = 0.1  # of the logged steps
DATA_WAIT_SHARE = 1 / 3
EXPECTED_SHARE = 0.05  # of the run, in which the loss still moves after a step at which it is expected to
FIRST_LOOKS = 3  # in which an untrained network is nothing unusual
NEWEST = 0.1  # share of a curve that counts as its end


@dataclass(frozen=True)
class Anomaly:
    """Something that stands out.

    Attributes:
        kind: `loss_spikes`, `gradient_spikes`, `center_explosion`, `entropy_collapse`, `slow_steps` or `data_wait`.
        steps: where.
        text: one sentence.
    """

    kind: str
    steps: list[int]
    text: str


def anomalies(history: History) -> list[Anomaly]:
    """All that were found, the grave ones first."""
    looks: list[Callable[[History], Anomaly | None]] = [
        _entropy_collapse,
        _center_explosion,
        _loss_spikes,
        _gradient_spikes,
        _data_wait,
        _slow_steps,
    ]
    return [found for look in looks if (found := look(history)) is not None]


def _loss_spikes(history: History) -> Anomaly | None:
    series = history.series("train/loss").finite
    around = LOSS_SPIKE_SHARE * np.abs(series.values)
    # A spike of a quarter above the loss around it is a fifth of itself.
    found = outliers(series.values, deviations=SPIKE_DEVIATIONS, at_least=around / (1 + LOSS_SPIKE_SHARE))
    later = [index for index in found if index >= FIRST_LOOKS]
    groups = grouped([index for index in later if not _is_expected(history, int(series.steps[index]))])
    steps = [int(series.steps[max(group, key=lambda index: float(series.values[index]))]) for group in groups]
    return Anomaly("loss_spikes", steps, f"the loss jumped {_times(steps)}: {_at(steps)}") if steps else None


def _is_expected(history: History, step: int) -> bool:
    """Whether the loss may move at a step: an expected move was shortly before, or just after."""
    length = EXPECTED_SHARE * (history.total_steps or history.step)
    return any(-1 <= step - event.step <= length for event in history.named("expected_move"))


def _gradient_spikes(history: History) -> Anomaly | None:
    series = history.series("train/grad_norm").finite
    logarithms = np.log10(np.maximum(series.values, 1e-30))
    found = outliers(logarithms, deviations=SPIKE_DEVIATIONS, at_least=math.log10(GRADIENT_SPIKE_FACTOR))
    steps = [int(series.steps[group[0]]) for group in grouped([index for index in found if index >= FIRST_LOOKS])]
    text = f"the gradient norm was over {GRADIENT_SPIKE_FACTOR:g} times its usual size {_times(steps)}: {_at(steps)}"
    return Anomaly("gradient_spikes", steps, text) if steps else None


def _center_explosion(history: History) -> Anomaly | None:
    series = history.series("train/center_norm").finite
    if len(series) < 2 * MIN_POINTS:
        return None
    before, now = np.median(series.values[: len(series) // 2]), np.median(_newest(series.values))
    if now <= CENTER_GROWTH * before:
        return None
    step = int(series.steps[np.argmax(series.values > CENTER_GROWTH * before)])
    text = f"the norm of the center grew from {before:.3g} to {now:.3g} and has not settled"
    return Anomaly("center_explosion", [step], text)


def _entropy_collapse(history: History) -> Anomaly | None:
    series = history.series("train/entropy_batch_mean").finite
    uniform = history.last("train/loss_uniform")
    if len(series) < MIN_POINTS or uniform is None:
        return None
    low = series.values < COLLAPSED_SHARE * uniform
    if not _newest(low).all():
        return None
    first = int(series.steps[len(low) - np.argmin(low[::-1])]) if not low.all() else int(series.steps[0])
    text = (
        f"the teacher gives the whole batch one prototype since step {first}: entropy of its mean "
        f"{np.median(_newest(series.values)):.2g} of at most {uniform:.2f} nats"
    )
    return Anomaly("entropy_collapse", [first], text)


def _data_wait(history: History) -> Anomaly | None:
    wait, step = history.series("perf/data_wait_s").finite, history.series("perf/step_time_s").finite
    if len(wait) < MIN_POINTS or not step.values.sum():
        return None
    share = float(wait.values.mean() / step.values.mean())
    text = f"{100 * share:.0f} % of the time of a step is spent waiting for data"
    return Anomaly("data_wait", [], text) if share > DATA_WAIT_SHARE else None


def _slow_steps(history: History) -> Anomaly | None:
    series = history.series("perf/step_time_s").finite
    if len(series) < 2 * MIN_POINTS:
        return None
    slow = np.flatnonzero(series.values[1:] > SLOW_FACTOR * np.median(series.values)) + 1  # the first one warms up
    steps = [int(series.steps[index]) for index in slow]
    text = f"{len(steps)} of {len(series)} logged steps took over {SLOW_FACTOR:g} times the median: {_at(steps)}"
    return Anomaly("slow_steps", steps, text) if len(steps) > SLOW_SHARE * len(series) else None


def _newest(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values[-max(MIN_POINTS // 2, round(NEWEST * len(values))) :]


def _times(steps: list[int]) -> str:
    return "once" if len(steps) == 1 else f"{len(steps)} times"


def _at(steps: list[int]) -> str:
    shown = ", ".join(map(str, steps[:5]))
    return f"step {shown}" if len(steps) == 1 else f"steps {shown}" + (" and more" if len(steps) > 5 else "")
