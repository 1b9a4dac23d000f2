"""The health score of a run: 1, less what each thing that is wrong costs."""

from collections.abc import Sequence
from dataclasses import dataclass

from dino.analysis.anomalies import Anomaly
from dino.analysis.charts import short
from dino.analysis.history import History
from dino.analysis.verdicts import Verdict
from dino.exits import EXIT_COLLAPSED

SEVERE, MILD = 0.5, 0.15  # a verdict
RECOVERED = 0.3  # share of that which stays where the run learns nevertheless
SKIPPED, MOST_SKIPPED = 0.05, 0.3  # a step that was not finite; all of them
NO_BETTER = {"val/knn_top1": 0.4, "val/effective_rank_ratio": 0.2}  # than the untrained network
FALL = 0.1  # of k-NN from its best value
FALL_SHARE = 0.1  # of that value, from which it counts
ANOMALIES = {  # kind -> each time, at most
    "entropy_collapse": (0.3, 0.3),
    "center_explosion": (0.2, 0.2),
    "loss_spikes": (0.03, 0.15),
    "gradient_spikes": (0.03, 0.15),
}
FAILED = {"failed": 0.1, "died": 0.05}  # the run, whatever it has learned until then


@dataclass(frozen=True)
class Deduction:
    """Points lost, and why."""

    points: float
    reason: str


def deductions(
    history: History, verdicts: Sequence[Verdict], anomalies: Sequence[Anomaly], *, learned: bool, early: bool
) -> list[Deduction]:
    """All of them, the largest first.

    Args:
        learned: whether the features are better than those of the untrained network.
        early: whether it is too soon to expect that.
    """
    found = [_for_verdict(verdict, learned) for verdict in verdicts]
    told = {verdict.kind for verdict in verdicts}
    for anomaly in anomalies:
        if anomaly.kind in ANOMALIES and anomaly.kind not in told:
            each, most = ANOMALIES[anomaly.kind]
            found.append(Deduction(min(most, each * len(anomaly.steps)), anomaly.text))
    skipped = len(history.named("skipped_step"))
    if skipped:
        steps = "1 step was" if skipped == 1 else f"{skipped} steps were"
        found.append(Deduction(min(MOST_SKIPPED, SKIPPED * skipped), f"{steps} skipped: loss or gradient not finite"))
    if not early:
        found += [lost for name, points in NO_BETTER.items() if (lost := _no_better(history, name, points))]
    fall = _fall(history)
    found += [fall] if fall else []
    if history.state in FAILED and history.status.get("exit_code") != EXIT_COLLAPSED:  # its verdict costs enough
        found.append(Deduction(FAILED[history.state], f"the run {history.state} before its end"))
    return sorted(found, key=lambda each: -each.points)


def _for_verdict(verdict: Verdict, learned: bool) -> Deduction:
    points = SEVERE if verdict.severe else MILD
    reason = f"verdict {verdict.title} ({verdict.when})"
    if learned and verdict.severe:
        return Deduction(round(RECOVERED * points, 2), f"{reason}, after which it learned nevertheless")
    return Deduction(points, reason)


def _no_better(history: History, name: str, points: float) -> Deduction | None:
    before, series = history.untrained(name), history.series(name).finite.trained
    if before is None or not len(series) or series.values[-1] > before:
        return None
    return Deduction(points, f"{short(name)} is no better than that of the untrained network")


def _fall(history: History) -> Deduction | None:
    """k-NN of 60 % that was once 80 %; where training starts from good weights too."""
    series = history.series("val/knn_top1").finite.trained
    if not len(series) or series.values[-1] >= (1 - FALL_SHARE) * series.values.max():
        return None
    best = float(series.values.max())
    reason = (
        f"k-NN was {best:.1f} % at step {int(series.steps[series.values.argmax()])} and is {series.values[-1]:.1f} %"
    )
    return Deduction(FALL, f"{reason}: best.pt holds the better one")
