"""Colour jitter as one affine map of the colours of a view (`augmentation.jitter_form=matrix`).

Brightness, contrast and saturation are affine; clipping between them is left out, and so their order is of no account:
saturation and hue keep the luma, and contrast leads towards its mean. The hue is turned in YIQ, about the axis of the
grays, which is another operation than turning the hue of HSV: it keeps the luma instead of the value, and saturated
colours differ most.

Shapes: N views.
"""

import math
from typing import Final

import torch
from torch import Tensor

from dino.augmentation.views import PhotometricParameters

# ITU-R 601 luma, as torchvision's rgb_to_grayscale has it, and the two axes of chroma of YIQ (FCC, 47 CFR 73.682).
LUMA: Final = (0.2989, 0.587, 0.114)
_YIQ: Final = (LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def jitter_matrices(parameters: PhotometricParameters, means: Tensor) -> Tensor:
    """The whole jitter of each view as a map of colours.

    Args:
        parameters: each [N], on the host.
        means: [N, 3] mean colour of the views, which contrast needs, on any device.

    Returns:
        float32 [N, 3, 4] on that device: a 3 x 3 matrix and what is added to it, in the unit of `means`.
    """
    brightness, contrast, saturation, hue = (
        getattr(parameters, name).double()[:, None, None] for name in ("brightness", "contrast", "saturation", "hue")
    )
    gray = torch.tensor(LUMA, dtype=torch.float64).expand(3, 3)
    colours = saturation * torch.eye(3, dtype=torch.float64) + (1 - saturation) * gray
    linear = brightness * contrast * (colours @ _hue_matrices(hue))
    of_mean = (brightness * (1 - contrast) * gray).expand(-1, 3, 3)  # what is added, as a map of the mean colour
    maps = torch.cat([linear, of_mean], dim=2).float()
    if means.device.type == "cuda":
        maps = maps.pin_memory()
    maps = maps.to(means.device, non_blocking=True)  # one copy, which nothing waits for
    return torch.cat([maps[:, :, :3], maps[:, :, 3:] @ means.float()[:, :, None]], dim=2)


def _hue_matrices(shift: Tensor) -> Tensor:
    """Turning the two axes of chroma by `shift` [N, 1, 1], in turns: [N, 3, 3]; red goes towards yellow, as in HSV."""
    angle = 2 * math.pi * shift[:, 0, 0]
    turn = torch.zeros(len(shift), 3, 3, dtype=torch.float64)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = angle.sin(), -angle.sin()
    to_yiq = torch.tensor(_YIQ, dtype=torch.float64)
    back: Tensor = torch.linalg.inv(to_yiq)
    return back @ turn @ to_yiq
