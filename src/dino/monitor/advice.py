"""What to change for each verdict: the config key, its value in this run, and a proposal with its reason."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dino.messages import show

Propose = Callable[[Any], Any]  # value -> proposal; None: there is nothing to propose
Rule = tuple[str, Propose, str]  # key, proposal, reason


@dataclass(frozen=True)
class Recommendation:
    """`loss.teacher_temp=0.04: try 0.02`, and why."""

    key: str
    value: Any
    proposal: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.key}={show(self.value)}: try {show(self.proposal)} ({self.reason})"


def recommended(settings: Mapping[str, Any], rules: Iterable[Rule]) -> list[Recommendation]:
    """One a key, by the first rule for it; keys that a run does not have (dotted key -> value) are left out."""
    made: dict[str, Recommendation] = {}
    for key, propose, reason in rules:
        proposal = propose(settings[key]) if key in settings else None
        if proposal is not None and key not in made:
            made[key] = Recommendation(key, settings[key], proposal, reason)
    return list(made.values())


def times(factor: float) -> Propose:
    return lambda value: float(f"{value * factor:.2g}") if _is_number(value) and value > 0 else None


def at_least(least: float) -> Propose:
    """The value itself where it is lower; None where nothing is to be raised."""
    return lambda value: least if not _is_number(value) or value < least else None


def at_most(most: float) -> Propose:
    return lambda value: most if _is_number(value) and value > most else None


def unless(right: Any) -> Propose:
    return lambda value: right if value != right else None


def closer_to_one(value: Any) -> Any:
    """0.99 -> 0.995: half of what is left."""
    return round((1 + value) / 2, 6) if _is_number(value) and value < 1 else None


def clipped(value: Any) -> Any:
    return 3.0 if not value else float(f"{value / 3:.2g}")


def where_missing(right: Any) -> Propose:
    """`right` in place of null or 0."""
    return lambda value: None if value else right


def not_fp16(value: Any) -> Any:
    return "auto" if value == "fp16" else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


SHARPER = "a sharper teacher keeps the student from the uniform distribution"
SMALLER = "smaller updates"
FOLLOWING = "a teacher that never follows teaches nothing"
CENTERED = "a center that follows keeps one prototype from winning"
UNCLIPPED = "gradients are not clipped"

ADVICE: dict[str, list[Rule]] = {  # by kind of verdict
    "uniform_collapse": [
        ("loss.teacher_temp", times(0.5), SHARPER),
        ("loss.warmup_teacher_temp", times(0.5), SHARPER),
        ("ema.momentum", at_most(0.999), FOLLOWING),
        ("loss.center_momentum", at_most(0.99), CENTERED),
    ],
    "constant_collapse": [
        ("loss.center_momentum", at_most(0.9), CENTERED),
        ("loss.koleo_weight", at_least(0.1), "KoLeo spreads the features over the sphere"),
        ("optimizer.lr", times(0.5), SMALLER),
    ],
    "features_lost": [
        ("trainer.freeze_backbone_steps", where_missing(500), "a fresh head first learns what the backbone knows"),
        ("optimizer.lr", times(0.3), SMALLER),
        ("ema.momentum", closer_to_one, "a teacher that forgets more slowly"),
    ],
    "entropy_collapse": [
        ("loss.teacher_temp", times(2), "a softer teacher"),
        ("loss.center_momentum", at_most(0.9), CENTERED),
    ],
    "center_explosion": [
        ("head.norm_last_layer", unless(True), "a frozen gain bounds the logits"),
        ("loss.center_momentum", at_most(0.9), CENTERED),
        ("optimizer.lr", times(1 / 3), SMALLER),
    ],
    "loss_explosion": [
        ("optimizer.lr", times(1 / 3), SMALLER),
        ("trainer.clip_norm", where_missing(3.0), UNCLIPPED),
        ("schedule.lr.warmup_epochs", where_missing(10), "there is no warm-up"),
    ],
    "plateau": [
        ("ema.momentum", at_most(0.999), FOLLOWING),
        ("loss.teacher_temp", times(0.5), "a sharper target gives more to learn"),
        ("optimizer.lr", times(2), "larger updates"),
    ],
    "oscillation": [
        ("optimizer.lr", times(0.5), SMALLER),
        ("ema.momentum", closer_to_one, "a teacher that moves more slowly"),
    ],
    "gradient_explosion": [
        ("trainer.clip_norm", clipped, "clip gradients harder"),
        ("optimizer.lr", times(1 / 3), SMALLER),
    ],
    "gradient_vanishing": [
        ("loss.student_temp", at_most(0.1), "a student this soft has no gradient"),
        ("loss.teacher_temp", times(0.5), SHARPER),
    ],
    "disagreement": [
        ("optimizer.lr", times(1 / 3), SMALLER),
        ("ema.momentum", closer_to_one, "a steadier teacher"),
    ],
    "non_finite": [
        ("trainer.precision", not_fp16, "bf16 and fp32 have the range that fp16 lacks"),
        ("optimizer.lr", times(1 / 3), SMALLER),
        ("trainer.clip_norm", where_missing(3.0), UNCLIPPED),
    ],
}
