"""What every logger is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunContext:
    """What a logger may want to know before the first metric. `first_step` is not 0 in a resumed run."""

    run_dir: Path
    first_step: int
    total_steps: int
    steps_per_epoch: int


class Logger:
    """A place that metrics go to. `step` counts finished optimizer steps: 0 is the untrained network.

    Only rank 0 has loggers. Every method may be left as it is here.
    """

    def start(self, context: RunContext) -> None:
        """Called once, after `load_state_dict` in a resumed run."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of a logged step or of an evaluation."""

    def event(self, step: int, name: str, text: str, **details: Any) -> None:
        """Something that happened at a step, in words, and in plain values."""

    def advance(self, step: int) -> None:
        """Called after every step, logged or not; must cost next to nothing."""

    def flush(self) -> None:
        """Puts everything logged so far on the disk; comes before every checkpoint, which is not written otherwise.

        Raises:
            OSError: it cannot be done.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on in the same place; plain types."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`."""

    def close(self) -> None:
        """Called once, also after a failure."""
