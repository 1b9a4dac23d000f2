"""The config group `monitor`: what is watched while a run trains."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from dino.monitor.early_stopping import EarlyStopping
from dino.monitor.health import Health
from dino.monitor.statistics import Statistics

OnCollapse = Literal["warn", "stop", "off"]


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """Statistics of every `every_steps`-th step, what they say of the run's health, and when to stop.

    Args:
        every_steps: period of the statistics.
        gradients_every: at one of so many logged steps also mean, deviation and extremes of the gradients.
        on_collapse: what a verdict does. `warn`: it is said and written down; `stop`: one that the run will not
            recover from ends it with exit code 4; `off`: there are none.
        report: whether the run leaves a `report.html`.

    Raises:
        ValueError: for an unknown `on_collapse`.
    """

    every_steps: int = 10
    gradients_every: int = 10
    on_collapse: OnCollapse = "warn"
    report: bool = True
    health: Health = field(default_factory=Health)
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)

    def __post_init__(self) -> None:
        if self.on_collapse not in get_args(OnCollapse):
            raise ValueError(f"monitor.on_collapse={self.on_collapse}: use {', '.join(get_args(OnCollapse))}")
        for name in ("health", "early_stopping"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"monitor.{name}=null: it has settings of its own; verdicts are off with on_collapse=off"
                )

    @property
    def statistics(self) -> Statistics:
        return Statistics(self.every_steps, self.gradients_every)
