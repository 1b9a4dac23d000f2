"""What every logger is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class RunContext:
    """What a logger may want to know before the first metric. `first_step` is not 0 in a resumed run."""

    run_dir: Path
    first_step: int
    total_steps: int
    steps_per_epoch: int


class Logger(Protocol):
    """A place that metrics go to. `step` counts finished optimizer steps: 0 is the untrained network."""

    def start(self, context: RunContext) -> None: ...

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def advance(self, step: int) -> None:
        """Called after every step, logged or not; must cost next to nothing."""

    def close(self) -> None: ...
