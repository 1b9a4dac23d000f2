"""Numbers as colours, for a person to look at.

Shapes: h x w values.
"""

from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# From nothing to the most: black, violet, red, orange, pale yellow.
COLOURS: Final = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])


def heat(weights: Tensor, size: tuple[int, int]) -> Image.Image:
    """[h, w] to a picture of `size` (width, height), each value of one colour; the largest is the brightest."""
    scaled = (weights / weights.max().clamp(min=torch.finfo(weights.dtype).tiny)).nan_to_num().clamp(0, 1).numpy()
    places = np.linspace(0, 1, len(COLOURS))
    colours = np.stack([np.interp(scaled, places, channel) for channel in COLOURS.T], axis=-1)
    return Image.fromarray(colours.round().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
