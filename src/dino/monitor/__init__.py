from dino.monitor.statistics import Statistics, StepFigures, distribution_statistics

__all__ = ["Statistics", "StepFigures", "distribution_statistics"]
