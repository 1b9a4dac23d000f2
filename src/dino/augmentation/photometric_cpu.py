"""The photometric operations of `photometric.py` for the workers: one view at a time, uint8 in and out, with OpenCV.

One view fits into the cache of a core, where every operation is a pass of some ten microseconds. Between the operations
values are float32, as they are there; they are rounded once, at the end, because bytes are a quarter of what crosses to
the training device. So a view differs from that of `photometric.py` by that rounding.

Shapes: N views, C channels, S x S view size.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino.augmentation.jitter_matrix import LUMA, jitter_matrices
from dino.augmentation.photometric import BLUR_SIGMAS, PhotometricSettings
from dino.augmentation.views import JITTER_ORDERS, NEUTRAL, PhotometricParameters

# Workers share the cores between them, and threads that OpenCV has started would be missing after a fork.
cv2.setNumThreads(1)

Pixels = Any  # float32 [S, S, C], 0 to 255; OpenCV's and NumPy's own types for it exclude each other

_LUMA: Final = np.array(LUMA, dtype=np.float32)[None]  # [1, 3]


def colour(views: Tensor, parameters: PhotometricParameters, settings: PhotometricSettings) -> Tensor:
    """Colour jitter, grayscale, blur and solarize; no normalisation.

    Args:
        views: uint8 [N, C, S, S] on the host.
        parameters: each [N].

    Returns:
        uint8 [N, C, S, S], channels last in memory.
    """
    pixels = views.movedim(1, -1).numpy()
    result = np.empty(pixels.shape, dtype=np.uint8)
    matrices = _matrices(pixels, parameters) if settings.jitters_by_matrix(views.shape[1]) else [None] * len(views)
    names, columns = zip(*vars(parameters).items(), strict=True)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for view, out, matrix, row in zip(pixels, result, matrices, rows, strict=True):
        out[...] = _coloured(view, dict(zip(names, row, strict=True)), matrix, settings)
    return torch.from_numpy(result).movedim(-1, 1)


def _coloured(
    view: NDArray[np.uint8], drawn: dict[str, Any], matrix: NDArray[np.float32] | None, settings: PhotometricSettings
) -> Any:
    """uint8 [S, S, C], as `view`."""
    pixels: Pixels = view.astype(np.float32, order="C")
    if matrix is not None:
        pixels = _clip(cv2.transform(pixels, matrix))
    else:
        for name in JITTER_ORDERS[drawn["order"]]:
            if drawn[name] != NEUTRAL[name]:
                pixels = _JITTER[name](pixels, drawn[name])
    if drawn["grayscale"]:
        pixels = cv2.transform(pixels, _LUMA)
    sigma = drawn["blur_sigma"]
    if sigma > 0:
        side = 2 * math.ceil(BLUR_SIGMAS * sigma) + 1
        pixels = cv2.GaussianBlur(pixels, (side, side), sigma, borderType=cv2.BORDER_REPLICATE)
    if drawn["solarize"]:
        pixels = np.where(pixels >= settings.solarize_threshold, 255 - pixels, pixels)
    rounded = cv2.convertScaleAbs(pixels)  # no value is negative
    return cv2.cvtColor(rounded, cv2.COLOR_GRAY2RGB) if drawn["grayscale"] else rounded.reshape(view.shape)


def _brightness(pixels: Pixels, factor: float) -> Pixels:
    pixels *= factor
    return _clip(pixels) if factor > 1 else pixels


def _contrast(pixels: Pixels, factor: float) -> Pixels:
    in_colour = pixels.shape[-1] == 3
    gray = np.dot(LUMA, cv2.mean(pixels)[:3]) if in_colour else pixels.mean(dtype=np.float64)
    pixels *= factor
    pixels += np.float32((1 - factor) * gray)
    return _clip(pixels) if factor > 1 else pixels


def _saturation(pixels: Pixels, factor: float) -> Pixels:
    pixels = cv2.transform(pixels, np.float32(factor) * np.eye(3, dtype=np.float32) + np.float32(1 - factor) * _LUMA)
    return _clip(pixels) if factor > 1 else pixels


def _hue(pixels: Pixels, shift: float) -> Pixels:
    turned: Pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)  # of floats: degrees, 0 to 1, 0 to 255, nothing rounded
    turned[..., 0] += 360 * (shift % 1)  # the way back goes wrong below 0, and right beyond 360
    return cv2.cvtColor(turned, cv2.COLOR_HSV2RGB)


def _clip(pixels: Pixels) -> Pixels:
    return np.clip(pixels, 0, 255, out=pixels)


_JITTER: Final[dict[str, Callable[[Pixels, float], Pixels]]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
}


def _matrices(pixels: NDArray[np.uint8], parameters: PhotometricParameters) -> list[NDArray[np.float32] | None]:
    """[3, 4] for each view, None where the jitter is neutral."""
    means = torch.tensor([cv2.mean(np.ascontiguousarray(view))[:3] for view in pixels])
    jittered = parameters.jittered().tolist()
    matrices = jitter_matrices(parameters, means).numpy()
    return [matrix if wanted else None for matrix, wanted in zip(matrices, jittered, strict=True)]
