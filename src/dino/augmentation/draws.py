"""Which draw decides what: the fixed slots of the random numbers of one view of one sample.

Slots are never renumbered: a new operation takes the next free ones, so that it cannot shift what others draw.

Shapes: u is [..., NUM_DRAWS], uniform on [0, 1).
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

CROP_ATTEMPTS: Final = 10  # torchvision.transforms.RandomResizedCrop.get_params

CROP_AREA: Final = slice(0, 20, 2)  # one of each per attempt
CROP_RATIO: Final = slice(1, 20, 2)
CROP_TOP: Final = 20
CROP_LEFT: Final = 21
FLIP: Final = 22
JITTER: Final = 23
JITTER_ORDER: Final = 24
BRIGHTNESS: Final = 25
CONTRAST: Final = 26
SATURATION: Final = 27
HUE: Final = 28
GRAYSCALE: Final = 29
BLUR: Final = 30
BLUR_SIGMA: Final = 31
SOLARIZE: Final = 32
NUM_DRAWS: Final = 33


def chance(u: Floats, slot: int, probability: float | Floats) -> Bools:
    """True with the given probability; [...] for u [..., NUM_DRAWS]."""
    return u[..., slot] < probability


def between(u: Floats, slot: int, low: float, high: float) -> Floats:
    """Uniform on [low, high)."""
    return low + (high - low) * u[..., slot]


def below(u: Floats, slot: int, n: int | NDArray[np.int64]) -> NDArray[np.int64]:
    """Uniform on the integers 0..n-1."""
    return np.floor(u[..., slot] * n).astype(np.int64)
