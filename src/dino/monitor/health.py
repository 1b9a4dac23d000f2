"""Whether a run learns, in words: the verdicts of `verdicts.py`, found in time, said once in a while, and counted."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dino.monitor.advice import ADVICE, recommended
from dino.monitor.verdicts import JUDGEMENTS, Finding, Look, Thresholds, feature_collapse, features_lost, plateau

WINDOW = 50  # logged steps
QUALITY = ("val/knn_top1", "val/effective_rank", "val/view_retrieval_top1")
PARTS = ("train/cross_entropy", "train/entropy_teacher", "train/kl_teacher_student")
MOST_ADVICE = 3  # recommendations in the sentence of a verdict; the report has all
LOW_LR = 0.1  # share of the highest learning rate below which a loss may well stand still
BETTER = 1.002  # times the evaluation before


@dataclass(frozen=True)
class Verdict:
    """Something that is wrong with a run. `severe`: it will not recover; `count`: at how many looks it was found.

    With `over` it is the news that it no longer holds.
    """

    kind: str
    text: str
    severe: bool
    count: int
    evidence: dict[str, float]
    over: bool = False


@dataclass(frozen=True)
class Facts:
    """What does not change during a run."""

    total_steps: int
    settled_step: int  # from here on warm-ups are over
    settings: Mapping[str, Any]  # dotted key -> value of the config


def began_with_weights(settings: Mapping[str, Any]) -> bool:
    """Whether a run of these settings (dotted keys) starts from a backbone that has learned."""
    return bool(settings.get("backbone.weights") or settings.get("backbone.pretrained"))


@dataclass(kw_only=True)
class Health(Thresholds):
    """Judges a run by the figures of its logged steps and evaluations, which are the same on every rank.

    Args:
        repeat_steps: a verdict that goes on to hold is said again after so many steps.

    Further arguments and what is raised: `Thresholds`.
    """

    repeat_steps: int = 2000
    counts: dict[str, int] = field(default_factory=dict, init=False)  # of each kind of verdict
    lost: str | None = field(default=None, init=False)  # the severe verdict that holds now, said or not
    facts: Facts = field(default=Facts(0, 0, {}), init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repeat_steps < 1:
            raise ValueError(f"monitor.health.repeat_steps={self.repeat_steps}: use a whole number of at least 1")
        self._since: dict[str, list[int]] = {}  # kind -> first step and number of looks in a row for which it holds
        self._said: dict[str, int] = {}  # kind -> the step at which it was said last
        self._holding: dict[str, str] = {}  # rule -> the kind that was said of it, as long as it holds
        self._losses: list[tuple[int, float]] = []
        self._agreements: list[float] = []
        self._grad_norms: list[float] = []
        self._highest_lr = 0.0
        self._untrained: dict[str, float] = {}  # its evaluation
        self._quality: dict[str, list[float]] = {}  # measure -> its last two values
        self._stretch: dict[str, list[float]] = {}  # part of the loss -> sum and number of its values in this stretch
        self._stretch_start: int | None = None
        self._stretch_before: dict[str, float] | None = None  # means

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Verdict]:
        """Takes in the metrics of a logged step or of an evaluation; the verdicts that are to be said now."""
        if "train/cross_entropy" in metrics:
            return self._observe_step(step, metrics)
        return self._observe_evaluation(step, metrics)

    def skipped(self, step: int) -> list[Verdict]:
        """Takes note of a step whose loss or gradient was not finite."""
        return self._said_now(step, "non_finite", Finding("a loss or gradient was not finite, see non_finite/"))

    def expect_move(self) -> None:
        """From here on the loss may go elsewhere: how it moved before says nothing of how it moves now."""
        self._losses, self._stretch, self._stretch_start, self._stretch_before = [], {}, None, None

    # ------------------------------------------------------------------ a logged step

    def _observe_step(self, step: int, metrics: Mapping[str, float]) -> list[Verdict]:
        self.lost = None
        loss = metrics["train/cross_entropy"]
        if not math.isfinite(loss):
            return []  # the step was skipped, which has a verdict of its own
        self._highest_lr = max(self._highest_lr, metrics.get("train/lr", 0.0))
        self._losses = [*self._losses, (step, loss)][-WINDOW:]
        self._agreements = [*self._agreements, metrics["train/student_teacher_agreement"]][-WINDOW:]
        look = self._look(step, metrics)
        verdicts = []
        for name, judgement in JUDGEMENTS.items():
            finding = judgement.rule(look)
            if finding is None:
                self._since.pop(name, None)
                verdicts += self._over(name)
                continue
            since = self._since.setdefault(name, [step, 0])
            since[1] += 1
            patient = step - since[0] >= self.patience_steps if judgement.looks is None else since[1] >= judgement.looks
            if patient:
                kind = self._holding[name] = finding.kind or name
                verdicts += self._said_now(step, kind, finding, held=step - since[0], severe=judgement.severe)
        verdicts += self._plateau(look)
        if math.isfinite(norm := metrics.get("train/grad_norm", math.nan)):
            self._grad_norms = [*self._grad_norms, norm][-WINDOW:]
        return verdicts

    def _plateau(self, look: Look) -> list[Verdict]:
        """Compares the means of the two halves of `plateau_steps`, whenever a half is full."""
        if not look.settled:
            return []
        if self._stretch_start is None:
            self._stretch_start = look.step
        for name in PARTS:
            total = self._stretch.setdefault(name, [0.0, 0])
            total[0], total[1] = total[0] + look[name], total[1] + 1
        length = self.plateau_steps or max(1000, self.facts.total_steps // 10)
        if look.step - self._stretch_start < length // 2:
            return []
        means = {name: total / count for name, (total, count) in self._stretch.items()}
        before, self._stretch_before = self._stretch_before, means
        self._stretch, self._stretch_start = {}, look.step
        collapsed = any(judgement.severe for kind, judgement in JUDGEMENTS.items() if kind in self._since)
        annealed = look["train/lr"] < LOW_LR * self._highest_lr
        if before is None or collapsed or annealed or not self._features_stand_still():
            return []
        finding = plateau(look, before, means)
        return [] if finding is None else self._said_now(look.step, "plateau", finding, held=length)

    def _features_stand_still(self) -> bool:
        """Whether they were measured twice and became better by no measure; the loss, which may stand still in a run
        that learns, is none."""
        pairs = [values for values in self._quality.values() if len(values) == 2]
        return bool(pairs) and not any(last > BETTER * before for before, last in pairs)

    # ------------------------------------------------------------------ an evaluation

    def _observe_evaluation(self, step: int, metrics: Mapping[str, float]) -> list[Verdict]:
        figures = {name: value for name, value in metrics.items() if name.startswith("val/")}
        if not figures:
            return []
        for name in QUALITY:
            if name in figures:
                self._quality[name] = [*self._quality.get(name, []), figures[name]][-2:]
        if step == 0:
            self._untrained = figures
        if step == 0 or "same_output" in self._holding:
            return []
        look = self._look(step, figures)
        collapsed, lost = feature_collapse(look), features_lost(look)
        if collapsed is not None:
            return self._said_now(step, "constant_collapse", collapsed, severe=True)
        return [] if lost is None else self._said_now(step, "features_lost", lost)

    # ------------------------------------------------------------------ what is said

    def _look(self, step: int, metrics: Mapping[str, float]) -> Look:
        return Look(
            step=step,
            metrics=metrics,
            losses=self._losses,
            agreements=self._agreements,
            grad_norms=self._grad_norms,
            untrained=self._untrained,
            began_with_weights=began_with_weights(self.facts.settings),
            settled=step >= self.facts.settled_step,
            thresholds=self,
        )

    def _said_now(
        self, step: int, kind: str, finding: Finding, *, held: int = 0, severe: bool = False
    ) -> list[Verdict]:
        """The verdict, unless it was said a short while ago; it counts in any case."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        for_long = f", for {held} steps" if held else ""
        advice = "; ".join(map(str, recommended(self.facts.settings, ADVICE[kind])[:MOST_ADVICE]))
        text = f"{finding.what}{for_long}. {advice}".rstrip(". ")
        if severe:
            self.lost = text
        said = self._said.get(kind)
        if said is not None and step - said < self.repeat_steps:
            return []
        self._said[kind] = step
        return [Verdict(kind, text, severe, self.counts[kind], finding.evidence)]

    def _over(self, name: str) -> list[Verdict]:
        """That a verdict which was said no longer holds."""
        kind = self._holding.pop(name, None)
        if kind is None:
            return []
        text = f"{kind.replace('_', ' ')} no longer holds"
        return [Verdict(kind, text, JUDGEMENTS[name].severe, self.counts[kind], {}, over=True)]

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on judging from `state`."""
        for name in STATE:
            setattr(self, name, state[name])


STATE = (
    "counts",
    "_since",
    "_said",
    "_holding",
    "_losses",
    "_agreements",
    "_grad_norms",
    "_highest_lr",
    "_untrained",
    "_quality",
    "_stretch",
    "_stretch_start",
    "_stretch_before",
)
