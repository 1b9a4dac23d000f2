"""What moves during training: lr, weight decay, teacher momentum, teacher temperature; each a function of the step."""

from dino.schedule.schedules import (
    Constant,
    Cosine,
    CosineRestarts,
    Linear,
    Polynomial,
    Schedule,
    ThreePhase,
    scaled_lr,
)

__all__ = [
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Linear",
    "Polynomial",
    "Schedule",
    "ThreePhase",
    "scaled_lr",
]
