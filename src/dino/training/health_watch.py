"""What becomes of the verdicts on a run: they are said, written down, and may end it."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from dino import ranks
from dino.logger import Logger
from dino.monitor import Facts, Monitor, Verdict, expected_moves
from dino.training.step import TrainStep

log = logging.getLogger("dino")


class HealthWatch:
    """Shows the figures of a run to `monitor.health`, and its verdicts to the loggers and in the log.

    Attributes:
        collapse: the sentence of a verdict that is to end the run; None as long as there is none.
    """

    def __init__(
        self,
        monitor: Monitor,
        loggers: Sequence[Logger],
        train_step: TrainStep,
        total_steps: int,
        settings: Mapping[str, Any],
    ) -> None:
        self.monitor = monitor
        self.health = monitor.health
        self.loggers = loggers
        self.collapse: str | None = None
        schedules, frozen = train_step.schedules, train_step.freeze_last_layer_steps
        self.moves = expected_moves(schedules, frozen, total_steps, train_step.freeze_backbone_steps)
        settled = max([frozen, train_step.freeze_backbone_steps, *schedules.lr.rises()[:1]])
        self.health.facts = Facts(total_steps, settled, settings)

    @property
    def counts(self) -> dict[str, int]:
        """Kind of verdict -> at how many logged steps or evaluations it was found."""
        return self.health.counts

    def announce(self, step: int) -> None:
        """Says what moves the loss from step number `step` on."""
        for move in self.moves.get(step, ()):
            log.info("expected    step %d: %s", step, move.text)
            for logger in self.loggers:
                logger.event(step, "expected_move", move.text, cause=move.cause)
            self.health.expect_move()

    def look(self, step: int, metrics: Mapping[str, float]) -> None:
        """Judges the metrics of a logged step or of an evaluation."""
        if self.monitor.on_collapse != "off":
            self._pass_on(step, self.health.observe(step, metrics))

    def skipped(self, step: int) -> None:
        """Judges a step whose loss or gradient was not finite."""
        if self.monitor.on_collapse != "off":
            self._pass_on(step, self.health.skipped(step))

    def _pass_on(self, step: int, verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            if ranks.rank() == 0:  # all of them find it
                log.warning("%s at step %d: %s", verdict.kind, step, verdict.text)
            for logger in self.loggers:
                logger.event(
                    step,
                    "verdict_over" if verdict.over else "verdict",
                    verdict.text,
                    verdict=verdict.kind,
                    severe=verdict.severe,
                    count=verdict.count,
                    evidence=verdict.evidence,
                )
        if self.monitor.on_collapse == "stop":
            self.collapse = self.health.lost

    def state_dict(self) -> dict[str, Any]:
        return self.health.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on judging from `state`."""
        self.health.load_state_dict(state)
