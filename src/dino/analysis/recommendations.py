"""What to change in a run: by its verdicts, and by what stands out beside them."""

from collections.abc import Iterable

from dino.analysis.history import History
from dino.monitor.advice import (
    ADVICE,
    FOLLOWING,
    UNCLIPPED,
    Recommendation,
    Rule,
    at_most,
    recommended,
    times,
    where_missing,
)

RULES: dict[str, list[Rule]] = ADVICE | {  # and by kind of anomaly
    "no_improvement": [
        ("ema.momentum", at_most(0.999), FOLLOWING),
        ("trainer.clip_norm", where_missing(3.0), UNCLIPPED),
        ("trainer.epochs", lambda value: 2 * value, "a longer run, before anything else"),
        ("loss.teacher_temp", times(0.5), "a sharper target gives more to learn"),
    ],
    "loss_spikes": [("trainer.clip_norm", where_missing(3.0), UNCLIPPED)],
    "gradient_spikes": [("trainer.clip_norm", where_missing(3.0), UNCLIPPED)],
    "data_wait": [("dataset.num_workers", lambda value: max(2, 2 * (value or 0)), "the step waits for data")],
}


def recommendations(history: History, kinds: Iterable[str]) -> list[Recommendation]:
    """One a key, the first reason given for it.

    Args:
        kinds: of verdicts and anomalies, the important ones first; `no_improvement` where the run does not learn.
    """
    return recommended(history.settings, [rule for kind in dict.fromkeys(kinds) for rule in RULES.get(kind, [])])
