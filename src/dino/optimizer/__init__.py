"""What changes parameters: groups, clipping and freezing of gradients, LARS, and the teacher's moving average."""

from dino.optimizer.clipping import ClipMode, clip_gradients
from dino.optimizer.ema import EMA, half_life_steps
from dino.optimizer.freezing import cancel_last_layer_gradients
from dino.optimizer.lars import LARS
from dino.optimizer.parameter_groups import parameter_groups

__all__ = [
    "EMA",
    "LARS",
    "ClipMode",
    "cancel_last_layer_gradients",
    "clip_gradients",
    "half_life_steps",
    "parameter_groups",
]
