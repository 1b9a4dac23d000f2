"""The config group `monitor`: what is watched while a run trains."""

from dataclasses import dataclass, field

from dino.monitor.early_stopping import EarlyStopping
from dino.monitor.statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """Statistics of every `every_steps`-th step, and when to stop."""

    every_steps: int = 10
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)

    @property
    def statistics(self) -> Statistics:
        return Statistics(self.every_steps)
