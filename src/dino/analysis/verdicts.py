"""The monitor's verdicts on a run's health, as `metrics.jsonl` has them: one a kind, with how often and when."""

from dataclasses import dataclass

from dino.analysis.history import Event, History

MOMENTARY = ("non_finite", "plateau", "features_lost")


@dataclass(frozen=True)
class Verdict:
    """One kind of verdict over the whole run; `text` is that of the newest, with evidence and advice."""

    kind: str
    severe: bool
    count: int
    first_step: int
    last_step: int
    text: str

    @property
    def title(self) -> str:
        """`uniform collapse`."""
        return self.kind.replace("_", " ")

    @property
    def when(self) -> str:
        """`step 40`, or `steps 40 to 90`."""
        if self.first_step == self.last_step:
            return f"step {self.first_step}"
        return f"steps {self.first_step} to {self.last_step}"


def verdicts(history: History) -> list[Verdict]:
    """The severe ones first, then in the order in which they were first given."""
    by_kind: dict[str, list[Event]] = {}
    for event in history.named("verdict"):
        by_kind.setdefault(str(event.details.get("verdict", "unknown")), []).append(event)
    found = [
        Verdict(
            kind=kind,
            severe=any(event.details.get("severe") for event in events),
            count=max(len(events), _count(events[-1])),
            first_step=events[0].step,
            last_step=_last_step(history, kind, events[-1].step),
            text=events[-1].text,
        )
        for kind, events in by_kind.items()
    ]
    return sorted(found, key=lambda verdict: not verdict.severe)


def _last_step(history: History, kind: str, said: int) -> int:
    """Until when it held, from when it was said last: there is an event when it is over. Those that hold at one step
    only have none."""
    if kind in MOMENTARY:
        return said
    over = [event.step for event in history.named("verdict_over") if event.details.get("verdict") == kind]
    return next((step for step in over if step >= said), history.step)


def _count(event: Event) -> int:
    count = event.details.get("count")
    return count if isinstance(count, int) else 0
