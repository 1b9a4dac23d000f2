from dino.monitor.early_stopping import EPOCH_LOSS, EarlyStopping, higher_is_better
from dino.monitor.monitor import Monitor
from dino.monitor.statistics import Statistics, StepFigures, distribution_statistics

__all__ = [
    "EPOCH_LOSS",
    "EarlyStopping",
    "Monitor",
    "Statistics",
    "StepFigures",
    "distribution_statistics",
    "higher_is_better",
]
