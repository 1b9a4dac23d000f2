"""What to change: the config key, its value in this run, and a proposal, by verdict and by what stands out."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dino.analysis.history import History
from dino.messages import show

Propose = Callable[[Any], Any]  # value -> proposal; None: there is nothing to propose


@dataclass(frozen=True)
class Recommendation:
    """`loss.teacher_temp=0.04: try 0.02`, and why."""

    key: str
    value: Any
    proposal: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.key}={show(self.value)}: try {show(self.proposal)} ({self.reason})"


def _times(factor: float) -> Propose:
    return lambda value: float(f"{value * factor:.2g}") if _is_number(value) and value > 0 else None


def _at_least(least: float) -> Propose:
    """The value itself where it is lower; None where nothing is to be raised."""
    return lambda value: least if not _is_number(value) or value < least else None


def _at_most(most: float) -> Propose:
    return lambda value: most if _is_number(value) and value > most else None


def _unless(right: Any) -> Propose:
    return lambda value: right if value != right else None


def _closer_to_one(value: Any) -> Any:
    """0.99 -> 0.995: half of what is left."""
    return round((1 + value) / 2, 6) if _is_number(value) and value < 1 else None


def _clipped(value: Any) -> Any:
    return 3.0 if not value else value / 3


def _not_fp16(value: Any) -> Any:
    return "auto" if value == "fp16" else None


SHARPER = "a sharper teacher keeps the student from the uniform distribution"
SMALLER = "smaller updates"
RULES: dict[str, list[tuple[str, Propose, str]]] = {  # kind of verdict or anomaly -> key, proposal, reason
    "uniform_collapse": [
        ("loss.teacher_temp", _times(0.5), SHARPER),
        ("loss.warmup_teacher_temp", _times(0.5), SHARPER),
        ("ema.momentum", _at_most(0.999), "a teacher that never follows teaches nothing"),
        ("loss.center_momentum", _at_most(0.99), "a center that never follows lets one prototype win"),
    ],
    "constant_collapse": [
        ("loss.center_momentum", _at_most(0.9), "a center that follows keeps one prototype from winning"),
        ("loss.koleo_weight", _at_least(0.1), "KoLeo spreads the features over the sphere"),
        ("optimizer.lr", _times(0.5), SMALLER),
    ],
    "entropy_collapse": [
        ("loss.teacher_temp", _times(2), "a softer teacher"),
        ("loss.center_momentum", _at_most(0.9), "a center that follows keeps one prototype from winning"),
    ],
    "center_explosion": [
        ("loss.center_momentum", _at_most(0.9), "a center that follows the teacher's logits sooner"),
        ("head.norm_last_layer", _unless(True), "a frozen gain bounds the logits"),
        ("optimizer.lr", _times(0.5), SMALLER),
    ],
    "loss_explosion": [
        ("optimizer.lr", _times(1 / 3), SMALLER),
        ("trainer.clip_norm", lambda value: None if value else 3.0, "gradients are not clipped"),
        ("schedule.lr.warmup_epochs", lambda value: None if value else 10, "there is no warm-up"),
    ],
    "plateau": [
        ("loss.teacher_temp", _times(0.5), "a sharper target gives more to learn"),
        ("optimizer.lr", _times(2), "larger updates"),
    ],
    "oscillation": [
        ("optimizer.lr", _times(0.5), SMALLER),
        ("ema.momentum", _closer_to_one, "a teacher that moves more slowly"),
    ],
    "gradient_explosion": [
        ("trainer.clip_norm", _clipped, "clip gradients harder"),
        ("optimizer.lr", _times(1 / 3), SMALLER),
    ],
    "gradient_vanishing": [
        ("loss.teacher_temp", _times(0.5), SHARPER),
        ("optimizer.lr", _times(2), "larger updates"),
    ],
    "disagreement": [
        ("ema.momentum", _closer_to_one, "a steadier teacher"),
        ("optimizer.lr", _times(0.5), SMALLER),
    ],
    "non_finite": [
        ("trainer.precision", _not_fp16, "bf16 and fp32 have the range that fp16 lacks"),
        ("optimizer.lr", _times(1 / 3), SMALLER),
        ("trainer.clip_norm", lambda value: None if value else 3.0, "gradients are not clipped"),
    ],
    "no_improvement": [
        ("trainer.epochs", lambda value: 2 * value, "a longer run, before anything else"),
        ("loss.teacher_temp", _times(0.5), "a sharper target gives more to learn"),
    ],
    "loss_spikes": [("trainer.clip_norm", lambda value: None if value else 3.0, "gradients are not clipped")],
    "gradient_spikes": [("trainer.clip_norm", lambda value: None if value else 3.0, "gradients are not clipped")],
    "data_wait": [("dataset.num_workers", lambda value: max(2, 2 * (value or 0)), "the step waits for data")],
}


def recommendations(history: History, kinds: Iterable[str]) -> list[Recommendation]:
    """One a key, the first reason given for it; keys that the run does not have are left out.

    Args:
        kinds: of verdicts and anomalies, the important ones first; `no_improvement` where the run does not learn.
    """
    settings = history.settings
    rules = [rule for kind in dict.fromkeys(kinds) for rule in RULES.get(kind, [])]
    made: dict[str, Recommendation] = {}
    for key, propose, reason in rules:
        proposal = propose(settings[key]) if key in settings else None
        if proposal is not None and key not in made:
            made[key] = Recommendation(key, settings[key], proposal, reason)
    return list(made.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
