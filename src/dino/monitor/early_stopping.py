"""Which evaluation was the best, and when there is no point in going on."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dino.messages import did_you_mean

log = logging.getLogger("dino")

Mode = Literal["auto", "max", "min"]

EPOCH_LOSS = "train/loss_epoch"  # mean loss of an epoch: what is left where nothing is evaluated
BETTER_HIGH = (
    *("knn", "linear_top", "effective_rank", "feature_std", "view_retrieval", "perf/images_per_s"),
    *("segmentation_", "retrieval_", "copy_"),
)
OF_STEPS = ("train/", "grad/", "perf/")  # how the metrics of logged steps begin
PREFERRED = ("val/knn_top1", "val/loss", EPOCH_LOSS)


def higher_is_better(metric: str) -> bool | None:
    """Which way a metric is better; None where neither way is."""
    if metric.endswith("_top1_std"):  # a deviation
        return None
    if any(word in metric for word in BETTER_HIGH):
        return True
    return False if "loss" in metric else None


@dataclass(kw_only=True)
class EarlyStopping:
    """Follows one metric: `best.pt` is the checkpoint of its best value, and a run may end when it stops improving.

    Args:
        metric: any metric of the evaluation, `train/loss_epoch`, or one of the logged steps, of which the last value
            before the evaluation counts. None: k-NN accuracy, where it cannot be had the validation loss, and without
            any evaluation the mean training loss of an epoch.
        mode: whether the largest or smallest value is the best; `auto` knows it for losses and features.
        patience: the run ends after so many evaluations in a row without improvement; None: it never ends early.
        min_delta: an improvement is a change by more than this.
        restore_best: the networks that the run leaves (and `last.pt`) are those of the best evaluation.

    Raises:
        ValueError: for a value out of its range, naming the key.
    """

    metric: str | None = None
    mode: Mode = "auto"
    patience: int | None = None
    min_delta: float = 0.0
    restore_best: bool = False
    best: float | None = field(default=None, init=False)
    best_step: int | None = field(default=None, init=False)
    num_without_improvement: int = field(default=0, init=False)
    available: list[str] = field(default_factory=list, init=False)  # the metrics of this run's evaluations

    def __post_init__(self) -> None:
        name = "monitor.early_stopping"
        if self.mode not in get_args(Mode):
            raise ValueError(f"{name}.mode={self.mode}: use {', '.join(get_args(Mode))}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"{name}.patience={self.patience}: use a whole number of at least 1, or null")
        if self.min_delta < 0:
            raise ValueError(f"{name}.min_delta={self.min_delta}: use a number of 0 or more")
        if self.metric is not None and self.mode == "auto" and higher_is_better(self.metric) is None:
            raise ValueError(
                f"{name}.mode=auto: whether {self.metric} is better high or low is not known; use max or min"
            )

    def choose(self, available: set[str]) -> None:
        """Settles which metric is followed, from the names that the evaluation of step 0 gave.

        Raises:
            ValueError: the metric asked for is not among them.
        """
        self.available = sorted({name for name in available if not name.startswith("perf/")} | {EPOCH_LOSS})
        if self.metric is None:
            self.metric = next(name for name in PREFERRED if name in self.available)
        elif self.metric not in self.available and not self._is_of_steps:
            known = ", ".join(self.available)
            raise ValueError(f"monitor.early_stopping.metric={self.metric}: this run has {known}")

    def check(self, logged: Mapping[str, float]) -> None:
        """Takes note of the names that logged steps have.

        Raises:
            ValueError: the metric asked for is one of logged steps, but not among them.
        """
        if self.metric in self.available or not self._is_of_steps or self.metric in logged:
            return
        group, _, _ = str(self.metric).rpartition("/")
        if f"{group}/norm" in logged:  # a frozen last layer has no more than the norm as yet
            return
        hint = did_you_mean(str(self.metric), logged)
        raise ValueError(f"monitor.early_stopping.metric={self.metric}: logged steps have no such metric{hint}")

    @property
    def _is_of_steps(self) -> bool:
        return self.metric is not None and self.metric.startswith(OF_STEPS)

    def update(self, step: int, metrics: dict[str, float]) -> bool:
        """Takes in the metrics of one evaluation; True if it is the best so far."""
        assert self.metric is not None, "choose() comes first"
        value = metrics.get(self.metric)
        if value is None:
            return False
        if self._improves(value):
            self.best, self.best_step, self.num_without_improvement = value, step, 0
            return True
        self.num_without_improvement += 1
        return False

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.num_without_improvement >= self.patience

    @property
    def reason(self) -> str:
        """In words, why the run ends early."""
        best = (
            "was never a number"
            if self.best is None
            else f"has not improved on {self.best:.5g} of step {self.best_step}"
        )
        return f"early stopping: {self.metric} {best} in {self.num_without_improvement} evaluations"

    def _improves(self, value: float) -> bool:
        if value != value:  # NaN
            return False
        if self.best is None:
            return True
        assert self.metric is not None
        largest = self.mode == "max" or (self.mode == "auto" and bool(higher_is_better(self.metric)))
        gain = value - self.best if largest else self.best - value
        return gain > self.min_delta

    def state_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "best": self.best,
            "best_step": self.best_step,
            "num_without_improvement": self.num_without_improvement,
            "available": self.available,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on counting; with another metric than before it starts anew.

        Raises:
            ValueError: the metric asked for is not among those of the evaluations.
        """
        if state["available"]:  # else the evaluation of step 0 is still to come
            self.choose(set(state["available"]))
        if self.metric not in (None, state["metric"]):
            log.info("early stopping follows %s now, in place of %s", self.metric, state["metric"])
            return
        self.metric, self.best, self.best_step = state["metric"], state["best"], state["best_step"]
        self.num_without_improvement = state["num_without_improvement"]
