"""Random resized crops of uint8 images: boxes, and the two ways to resize what lies in them.

Small stacked images are resized all at once by two small matrices each (a per-image call costs more than its
arithmetic there), large ones by torch's antialiased uint8 kernel, one call per crop (0.16 ms for a 224 px crop of a
photo on one core; Pillow takes 1.0 ms, torch on floats 0.8 ms). Both filter across and then down, with Pillow's
kernels, and round to uint8 after each.

Shapes: B images, V views of one size, C channels, H x W image size, S view size.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Final, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dino.augmentation import draws

Interpolation = Literal["bicubic", "bilinear"]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Where matrices are faster than one call per crop; beyond, their size grows faster than what they save.
SMALL_IMAGE: Final = 32
SMALL_VIEW: Final = 64
# Weights are whole multiples of 2**-22, as in Pillow (Resample.c, PRECISION_BITS). Every product and sum is then exact
# in float64, so the pixels cannot depend on the batch size or on the order in which a matrix product adds.
_WEIGHT_SCALE: Final = 2.0**22


def random_boxes(u: draws.Floats, heights: Ints, widths: Ints, scale: Sequence[float], ratio: Sequence[float]) -> Ints:
    """Boxes as torchvision's RandomResizedCrop draws them: ten attempts, then the largest central box of valid ratio.

    Args:
        u: [V, B, NUM_DRAWS].
        heights, widths: [B] image sizes in pixels.
        scale: smallest and largest area of the box, as a fraction of the image.
        ratio: smallest and largest width / height of the box.

    Returns:
        [V, B, 4]: top, left, height, width.
    """
    heights, widths = heights[:, None], widths[:, None]
    area = (heights * widths) * (scale[0] + (scale[1] - scale[0]) * u[..., draws.CROP_AREA])
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(log_low + (log_high - log_low) * u[..., draws.CROP_RATIO])
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))  # [V, B, attempts]
    fits = (w > 0) & (w <= widths) & (h > 0) & (h <= heights)
    first = fits.argmax(axis=-1, keepdims=True)
    found = fits.any(axis=-1)
    central_h, central_w = _central_size(heights[:, 0], widths[:, 0], ratio)
    h = np.where(found, np.take_along_axis(h, first, axis=-1)[..., 0], central_h).astype(np.int64)
    w = np.where(found, np.take_along_axis(w, first, axis=-1)[..., 0], central_w).astype(np.int64)
    free_h, free_w = heights[:, 0] - h, widths[:, 0] - w
    top = np.where(found, draws.below(u, draws.CROP_TOP, free_h + 1), free_h // 2)
    left = np.where(found, draws.below(u, draws.CROP_LEFT, free_w + 1), free_w // 2)
    return np.stack([top, left, h, w], axis=-1)


def _central_size(heights: Ints, widths: Ints, ratio: Sequence[float]) -> tuple[draws.Floats, draws.Floats]:
    aspect = widths / heights
    h = np.where(aspect < ratio[0], np.rint(widths / ratio[0]), heights)
    w = np.where(aspect > ratio[1], np.rint(heights * ratio[1]), widths)
    return np.maximum(h, 1), np.maximum(w, 1)


def scale_boxes(boxes: Ints, sizes: Ints, scaled: Ints) -> Ints:
    """Boxes [V, B, 4] in images of `sizes` [B, 2] (height, width), moved to the same images of the sizes `scaled`.

    Their edges are rounded to whole pixels of these; at least one pixel is left.
    """
    ratio = scaled / sizes
    first = np.minimum(np.rint(boxes[..., :2] * ratio).astype(np.int64), scaled - 1)
    last = np.rint((boxes[..., :2] + boxes[..., 2:]) * ratio).astype(np.int64)
    return np.concatenate([first, np.maximum(last - first, 1)], axis=-1)


def crop(
    images: Tensor | Sequence[Tensor], boxes: Ints, flips: Bools, size: int, interpolation: Interpolation = "bicubic"
) -> Tensor:
    """Cuts out the boxes, resizes them to `size` x `size` with antialiasing, and mirrors some.

    Args:
        images: uint8 [B, C, H, W], or B images [C, H, W] of different sizes.
        boxes: [V, B, 4] top, left, height, width, inside the images.
        flips: [V, B], true where the view is mirrored left to right.

    Returns:
        uint8 [V, B, C, size, size].
    """
    if isinstance(images, Tensor) and max(images.shape[-2:]) <= SMALL_IMAGE and size <= SMALL_VIEW:
        return crop_by_matrices(images, boxes, flips, size, interpolation)
    return crop_one_by_one(images, boxes, flips, size, interpolation)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Crops are too small to be shared between threads, which would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def crop_one_by_one(
    images: Tensor | Sequence[Tensor], boxes: Ints, flips: Bools, size: int, interpolation: Interpolation
) -> Tensor:
    """`crop` with one torch call per crop; the views lie channels last in memory, as the kernel makes them."""
    num_views, num_images = boxes.shape[:2]
    views = torch.empty(num_views, num_images, size, size, images[0].shape[0], dtype=torch.uint8).movedim(-1, 2)
    for i, (of_image, mirrored) in enumerate(zip(boxes.swapaxes(0, 1).tolist(), flips.T.tolist(), strict=True)):
        # torch's fast kernels want channels last, and at most four of them.
        image = images[i][None].contiguous(memory_format=torch.channels_last)
        for part, channels in zip(torch.split(image, 4, dim=1), torch.split(views[:, i], 4, dim=1), strict=True):
            for view, (top, left, height, width), mirror in zip(channels, of_image, mirrored, strict=True):
                box = part[:, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
                resized = F.interpolate(box, (size, size), mode=interpolation, antialias=True)[0]
                view.copy_(resized.flip(-1) if mirror else resized)
    return views


def crop_by_matrices(images: Tensor, boxes: Ints, flips: Bools, size: int, interpolation: Interpolation) -> Tensor:
    """`crop` with two matrix products for all views of an image; the pixels are Pillow's."""
    num_images, num_channels, height, width = images.shape
    num_crops = num_images * len(boxes)
    # In the order of the images [B, V], so that one product makes all views of an image from its pixels as they lie.
    top, left, box_height, box_width = torch.from_numpy(np.ascontiguousarray(boxes.T))
    mirrored = torch.from_numpy(flips.T.astype(np.int64, order="C"))
    across = _resize_weights(width, size, interpolation)[mirrored, left, box_width - 1]  # [B, V, S, W]
    down = _resize_weights(height, size, interpolation)[0, top, box_height - 1]  # [B, V, S, H]
    columns = images.to(torch.float64).flatten(1, 2).transpose(1, 2)  # [B, W, C*H]
    resized = _round(torch.bmm(across.flatten(1, 2), columns))  # [B, V*S, C*H]
    rows = resized.view(num_crops, size, num_channels, height).transpose(1, 2).reshape(num_crops, -1, height)
    turned = _round(torch.bmm(rows, down.flatten(0, 1).transpose(1, 2)))  # [B*V, C*S, S]: column by column
    turned = turned.view(num_images, -1, num_channels, size, size)
    return turned.permute(1, 0, 2, 4, 3).to(torch.uint8, memory_format=torch.contiguous_format)


def _round(x: Tensor) -> Tensor:
    return x.add_(0.5).floor_().clamp_(0, 255)


@functools.lru_cache(maxsize=8)
def _resize_weights(in_size: int, out_size: int, interpolation: Interpolation) -> Tensor:
    """Weights of every box along one side: [mirrored, start, length - 1, output pixel, input pixel], float64."""
    weights = torch.zeros(2, in_size, in_size, out_size, in_size, dtype=torch.float64)
    for length in range(1, in_size + 1):
        of_length = torch.from_numpy(resize_matrix(length, out_size, interpolation))
        for start in range(in_size - length + 1):
            weights[0, start, length - 1, :, start : start + length] = of_length
    weights[1] = weights[0].flip(2)
    return weights


def resize_matrix(in_size: int, out_size: int, interpolation: Interpolation) -> NDArray[np.float64]:
    """Antialiased resizing of one side as a matrix [out_size, in_size], in Pillow's weights (Resample.c).

    Bicubic is Keys' kernel with a = -0.5, bilinear the triangle; both are stretched when the side shrinks.
    """
    stretch = max(in_size / out_size, 1.0)
    reach = stretch * (2.0 if interpolation == "bicubic" else 1.0)
    center = (np.arange(out_size)[:, None] + 0.5) * (in_size / out_size)
    first = np.maximum(np.trunc(center - reach + 0.5), 0)
    last = np.minimum(np.trunc(center + reach + 0.5), in_size)
    pixel = np.arange(in_size)
    kernel = _cubic if interpolation == "bicubic" else _triangle
    weights = kernel(np.abs((pixel - center + 0.5) / stretch)) * ((pixel >= first) & (pixel < last))
    weights /= weights.sum(axis=1, keepdims=True)
    rounded: NDArray[np.float64] = np.trunc(weights * _WEIGHT_SCALE + np.copysign(0.5, weights))
    return rounded / _WEIGHT_SCALE


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _triangle(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(1.0 - x, 0.0)
