"""What the health of a run is judged by: one function a verdict, from the figures of a logged step to a finding.

Names of metrics are those of metrics.jsonl.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields

MIN_LOOKS = 20  # logged steps before something is said of how figures move
SMALL_GRAD_NORM = 0.1  # below this no norm is usual: a hundred times of little is no explosion
UNIFORM = 0.95  # share of ln K from which an entropy counts as that of the uniform distribution
INFORMATION = ("train/entropy_teacher", "train/entropy_batch_mean", "train/mutual_information")


@dataclass(kw_only=True)
class Thresholds:
    """From which figures on a run is not well; the keys of `monitor.health`.

    Args:
        patience_steps: a condition has to hold for so many steps in a row.
        min_information: mutual information of image and prototype in the teacher's outputs [nats].
        min_entropy: of the teacher's outputs [nats].
        max_confidence: of the teacher: mean largest probability.
        max_center_norm: None: 10 sqrt(K), which takes gains of the last layer that grow without end.
        min_agreement: share of pairs for which student and teacher have the same most likely prototype.
        max_loss: cross-entropy; None: 2 ln K.
        max_oscillation: standard deviation of the loss around its trend, as a share of ln K.
        min_grad_norm, max_grad_norm: of all gradients together, before clipping.
        max_grad_norm_ratio: norm of the gradients over their median of before.
        min_feature_std, min_effective_rank_ratio: of the features at an evaluation, where also below half of the
            untrained network's.
        max_knn_loss: points by which k-NN may be worse than at the start, for a run that began with weights of its own.
        min_change: of the mean loss, as a share of ln K: what is less is a plateau.
        plateau_steps: how long a plateau is; None: a tenth of the run, at least 1000 steps.

    Raises:
        ValueError: for a number out of its range, naming the key.
    """

    patience_steps: int = 200
    min_information: float = 0.05
    min_entropy: float = 0.02
    max_confidence: float = 0.995
    max_center_norm: float | None = None
    min_agreement: float = 0.01
    max_loss: float | None = None
    max_oscillation: float = 0.15
    min_grad_norm: float = 1e-4
    max_grad_norm: float = 1e4
    max_grad_norm_ratio: float = 100.0
    min_feature_std: float = 0.05
    min_effective_rank_ratio: float = 0.05
    max_knn_loss: float = 5.0
    min_change: float = 0.005
    plateau_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("patience_steps", "plateau_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"monitor.health.{name}={value}: use a whole number of at least 1")
        for item in fields(Thresholds):
            value = getattr(self, item.name)
            if value is not None and value < 0:
                raise ValueError(f"monitor.health.{item.name}={value}: use a number of 0 or more")


@dataclass(frozen=True)
class Look:
    """Everything that a rule may look at."""

    step: int
    metrics: Mapping[str, float]  # of this step
    losses: Sequence[tuple[int, float]]  # step and cross-entropy of the last looks, this one included
    agreements: Sequence[float]  # of student and teacher, at the last looks, this one included
    grad_norms: Sequence[float]  # of the last looks, this one not included
    untrained: Mapping[str, float]  # the evaluation of step 0
    began_with_weights: bool
    settled: bool  # warm-ups are over
    thresholds: Thresholds

    def __getitem__(self, name: str) -> float:
        """A metric; NaN where this step has it not, so that no comparison holds."""
        return self.metrics.get(name, math.nan)

    @property
    def uniform(self) -> float:
        """ln K."""
        return self["train/loss_uniform"]

    @property
    def says_nothing(self) -> bool:
        """Whether the teacher's output is the same whatever the image."""
        return self["train/mutual_information"] < self.thresholds.min_information


@dataclass(frozen=True)
class Finding:
    """What is wrong, and the figures that say so."""

    what: str
    evidence: dict[str, float] = field(default_factory=dict)
    kind: str | None = None  # of the verdict; None: that of the rule


def _evidence(look: Look, *names: str) -> dict[str, float]:
    return {name: look.metrics[name] for name in names if name in look.metrics}


# ---------------------------------------------------------------------- collapse


def same_output(look: Look) -> Finding | None:
    """The teacher gives every image the same output: the uniform distribution where nothing sharpens it, another one
    where nothing centers it (paper, section 5.3)."""
    entropy, uniform = look["train/entropy_teacher"], look["train/loss_uniform"]
    if not (look.settled and look.says_nothing):
        return None
    if entropy > UNIFORM * uniform:
        return Finding(
            f"the loss of {look['train/cross_entropy']:.3f} is that of a guess, ln K = {uniform:.3f}: the teacher "
            f"gives every image the uniform distribution (entropy {entropy:.3f}) and the student follows it "
            f"(KL {look['train/kl_teacher_student']:.1e}): uniform collapse",
            _evidence(look, "train/cross_entropy", "train/loss_uniform", "train/kl_teacher_student", *INFORMATION),
            "uniform_collapse",
        )
    return Finding(
        f"the teacher gives every image the same output (entropy {entropy:.2f} of one image, "
        f"{look['train/entropy_batch_mean']:.2f} of the whole batch): constant collapse",
        _evidence(look, *INFORMATION, "train/num_prototypes_used"),
        "constant_collapse",
    )


def feature_collapse(look: Look) -> Finding | None:
    """The same, seen in the features at an evaluation: poorer than those of the untrained network, poor as they are."""
    limits = {
        "val/feature_std": look.thresholds.min_feature_std,
        "val/effective_rank_ratio": look.thresholds.min_effective_rank_ratio,
    }
    for name, limit in limits.items():
        value = look[name]
        if look.settled and value < limit and value < 0.5 * look.untrained.get(name, math.inf):
            return Finding(
                f"{name} has fallen to {value:.3g} ({look.untrained.get(name, math.nan):.3g} untrained): the features "
                "of all images become the same, constant collapse",
                {name: value},
            )
    return None


def features_lost(look: Look) -> Finding | None:
    """A run that began with weights that had learned has made them worse (continued from a backbone alone, a fresh
    head teaches it noise at first)."""
    before, now = look.untrained.get("val/knn_top1", math.nan), look["val/knn_top1"]
    if not (look.began_with_weights and now < before - look.thresholds.max_knn_loss):
        return None
    return Finding(
        f"k-NN has fallen from the {before:.1f} % of the loaded weights to {now:.1f} %: what they knew is being lost",
        {"val/knn_top1": now, "val/knn_top1 of the loaded weights": before},
    )


def entropy_collapse(look: Look) -> Finding | None:
    """Every output is a single prototype: too much sharpening."""
    entropy, confidence = look["train/entropy_teacher"], look["train/confidence_teacher"]
    sharp = entropy < look.thresholds.min_entropy or confidence > look.thresholds.max_confidence
    if not (look.settled and sharp and not look.says_nothing):
        return None
    return Finding(
        f"the teacher puts {100 * confidence:.1f} % of its probability on one prototype (entropy {entropy:.1e}): "
        "entropy collapse",
        _evidence(look, "train/entropy_teacher", "train/confidence_teacher"),
    )


def disagreement(look: Look) -> Finding | None:
    """The student predicts other prototypes than the teacher."""
    if len(look.agreements) < MIN_LOOKS:
        return None
    agreement = statistics.fmean(look.agreements)
    if not (look.settled and agreement < look.thresholds.min_agreement and not look.says_nothing):
        return None
    return Finding(
        f"student and teacher have the same most likely prototype for only {100 * agreement:.2f} % of the pairs",
        {"train/student_teacher_agreement": agreement} | _evidence(look, "train/cross_entropy"),
    )


# ---------------------------------------------------------------------- explosion


def center_explosion(look: Look) -> Finding | None:
    """Logits are cosines times the gains of the prototypes: with gains of 1 no center is longer than sqrt(K)."""
    norm = look["train/center_norm"]
    limit = look.thresholds.max_center_norm or 10 * math.exp(look.uniform / 2)
    if not norm > limit:
        return None
    return Finding(
        f"the center has grown to a norm of {norm:.3g} (limit {limit:.3g})",
        _evidence(look, "train/center_norm"),
    )


def loss_explosion(look: Look) -> Finding | None:
    """Far above ln K the student is sure of what is wrong."""
    loss = look["train/cross_entropy"]
    limit = look.thresholds.max_loss or 2 * look.uniform
    if not loss > limit:
        return None
    return Finding(
        f"the cross-entropy of {loss:.3g} is far above ln K = {look.uniform:.2f}: the loss explodes",
        _evidence(look, "train/cross_entropy", "train/loss_uniform"),
    )


def gradient_explosion(look: Look) -> Finding | None:
    """Before clipping; against what was usual, and in itself."""
    norm = look["train/grad_norm"]
    if not math.isfinite(norm):  # a step that was skipped, or fp16 looking for its scale
        return None
    usual = statistics.median(look.grad_norms) if len(look.grad_norms) >= MIN_LOOKS else math.inf
    limit = min(look.thresholds.max_grad_norm, look.thresholds.max_grad_norm_ratio * max(usual, SMALL_GRAD_NORM))
    if not norm > limit:
        return None
    before = f", {norm / usual:.0f} times the usual {usual:.2g}" if usual < math.inf else ""
    return Finding(
        f"the norm of the gradients is {norm:.3g}{before}: they explode",
        _evidence(look, "train/grad_norm"),
    )


def gradient_vanishing(look: Look) -> Finding | None:
    """Before clipping."""
    norm = look["train/grad_norm"]
    if not (look.settled and norm < look.thresholds.min_grad_norm):
        return None
    return Finding(
        f"the norm of the gradients is {norm:.1e}: they vanish, and nothing is learned",
        _evidence(look, "train/grad_norm"),
    )


# ---------------------------------------------------------------------- movement


def oscillation(look: Look) -> Finding | None:
    """The loss swings around its trend by a large part of ln K."""
    if not look.settled or len(look.losses) < MIN_LOOKS:
        return None
    swings = residuals(look.losses)
    deviation = statistics.pstdev(swings)
    crossings = sum(a * b < 0 for a, b in itertools.pairwise(swings)) / (len(swings) - 1)
    if not (deviation > look.thresholds.max_oscillation * look.uniform and crossings > 0.1):
        return None
    return Finding(
        f"the loss swings by {deviation:.2g} around its trend, {100 * deviation / look.uniform:.0f} % of ln K",
        {"deviation": deviation, "train/loss_uniform": look.uniform},
    )


def residuals(points: Sequence[tuple[int, float]]) -> list[float]:
    """What a straight line through the points leaves of them."""
    line = statistics.linear_regression([step for step, _ in points], [value for _, value in points])
    return [value - line.slope * step - line.intercept for step, value in points]


def plateau(look: Look, before: Mapping[str, float], now: Mapping[str, float]) -> Finding | None:
    """The means of two long stretches of steps are the same, of the loss and of both of its parts."""
    change = max(abs(now[name] - before[name]) for name in now)
    if not change < look.thresholds.min_change * look.uniform:
        return None
    return Finding(
        f"the loss stays at {now['train/cross_entropy']:.3f} and its parts move by less than {change:.1e}: a plateau",
        {"train/cross_entropy": now["train/cross_entropy"], "change": change},
    )


@dataclass(frozen=True)
class Judgement:
    """A rule, for how many logged steps in a row it must hold (None: for `patience_steps`), and whether a run for which
    it holds is lost."""

    rule: Callable[[Look], Finding | None]
    looks: int | None = None
    severe: bool = False


JUDGEMENTS: dict[str, Judgement] = {
    "same_output": Judgement(same_output, severe=True),
    "entropy_collapse": Judgement(entropy_collapse, severe=True),
    "center_explosion": Judgement(center_explosion, looks=3, severe=True),
    "loss_explosion": Judgement(loss_explosion, severe=True),
    "gradient_explosion": Judgement(gradient_explosion, looks=3),
    "gradient_vanishing": Judgement(gradient_vanishing),
    "disagreement": Judgement(disagreement),
    "oscillation": Judgement(oscillation),
}
