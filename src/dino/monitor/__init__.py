from dino.monitor.early_stopping import EPOCH_LOSS, OF_STEPS, EarlyStopping, higher_is_better
from dino.monitor.expected_moves import ExpectedMove, expected_moves
from dino.monitor.health import Facts, Health, Verdict, began_with_weights
from dino.monitor.memory import memory_statistics
from dino.monitor.monitor import Monitor
from dino.monitor.statistics import OutputStatistics, Statistics, StepFigures, distribution_statistics
from dino.monitor.step_time import StepTimer

__all__ = [
    "EPOCH_LOSS",
    "OF_STEPS",
    "EarlyStopping",
    "ExpectedMove",
    "Facts",
    "Health",
    "Monitor",
    "OutputStatistics",
    "Statistics",
    "StepFigures",
    "StepTimer",
    "Verdict",
    "began_with_weights",
    "distribution_statistics",
    "expected_moves",
    "higher_is_better",
    "memory_statistics",
]
