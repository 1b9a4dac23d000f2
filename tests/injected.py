"""Parts of a run that misbehave on purpose; named by the tests as `_target_`."""

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino.evaluation import EvaluationInputs, KNNEvaluator
from dino.loss import Centering, DINOLoss, LossTerms
from dino.loss.dino_loss import Implementation
from dino.loss.weighting import WeightingName


class InfiniteLoss(DINOLoss):
    """The DINO loss, but infinite at the micro-batches named by `at` (counted from 1)."""

    def __init__(
        self,
        centering: Centering,
        at: list[int],
        student_temp: float,
        weighting: WeightingName,
        local_weight: float,
        koleo_weight: float,
        implementation: Implementation,
    ) -> None:
        super().__init__(centering, student_temp, weighting, local_weight, koleo_weight, implementation)
        self.at = at
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, *args: Any, **options: Any) -> LossTerms:
        terms = super().forward(*args, **options)
        self.count += 1
        return dataclasses.replace(terms, total=terms.total * torch.inf) if int(self.count) in self.at else terms


class DyingRank(DINOLoss):
    """The DINO loss; at the fourth micro-batch rank 1 ends, by an exception."""

    count = 0

    def forward(self, *args: Any, **options: Any) -> LossTerms:
        self.count += 1
        if self.count == 4 and os.environ["RANK"] == "1":
            self.die()
        return super().forward(*args, **options)

    def die(self) -> None:
        raise RuntimeError("this rank has had enough")


class KilledRank(DyingRank):
    """The same, by SIGKILL."""

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class HungryLoss(DINOLoss):
    """The DINO loss of a machine without memory: it asks for more than there is."""

    def forward(self, *args: Any, **options: Any) -> LossTerms:
        nothing: Tensor = torch.empty(2**46)
        raise AssertionError(nothing)


class AnnouncedKNN(KNNEvaluator):
    """k-NN that leaves a file `evaluating` when it begins, and waits a moment."""

    def evaluate(self, inputs: EvaluationInputs) -> dict[str, float]:
        if not inputs.untrained:
            Path("evaluating").touch()
            time.sleep(1)
        return super().evaluate(inputs)
