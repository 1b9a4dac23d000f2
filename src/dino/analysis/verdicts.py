"""The monitor's verdicts on a run's health, as `metrics.jsonl` has them: one a kind, with how often and when."""

from dataclasses import dataclass

from dino.analysis.history import Event, History


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
        """`step 40`, or `3 times, steps 40 to 90`."""
        if self.first_step == self.last_step:
            return f"step {self.first_step}"
        return f"{self.count} times, steps {self.first_step} to {self.last_step}"


def verdicts(history: History) -> list[Verdict]:
    """The severe ones first, then in the order in which they were first given."""
    by_kind: dict[str, list[Event]] = {}
    for event in history.named("verdict"):
        by_kind.setdefault(str(event.details.get("verdict", "unknown")), []).append(event)
    found = [
        Verdict(
            kind=kind,
            severe=any(event.details.get("severe") for event in events),
            count=max(len(events), int(events[-1].details.get("count") or 0)),
            first_step=events[0].step,
            last_step=events[-1].step,
            text=events[-1].text,
        )
        for kind, events in by_kind.items()
    ]
    return sorted(found, key=lambda verdict: not verdict.severe)
