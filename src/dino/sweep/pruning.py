"""When a trial of a search is ended early, because others did better by then."""

from dataclasses import dataclass

PRUNERS = ("median", "asha")


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What the search compares trials by while they run.

    Attributes:
        pruner: None: no trial is ended early; `median`: one whose best so far is worse than the median of the others
            at the same epoch; `asha`: all but the best quarter at `warmup_epochs`, at 4 times, 16 times as many epochs.
        metric: whose values in `metrics.jsonl` are compared, larger or smaller as `sweep.direction` says; None: that
            of the sweep.
        startup_trials: no trial is ended by the median before so many have finished.
        warmup_epochs: nor before it has trained for so many epochs.

    Raises:
        ValueError: naming the key.
    """

    pruner: str | None = None
    metric: str | None = None
    startup_trials: int = 5
    warmup_epochs: int = 5

    def __post_init__(self) -> None:
        if self.pruner is not None and self.pruner not in PRUNERS:
            raise ValueError(f"sweep.pruning.pruner={self.pruner}: use {' or '.join(PRUNERS)}, or null")
        for key, least in (("startup_trials", 0), ("warmup_epochs", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"sweep.pruning.{key}={getattr(self, key)}: use a whole number of at least {least}")
