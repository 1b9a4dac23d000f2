"""Colour jitter, grayscale, blur, solarize and normalisation of a batch, every sample with its own parameters.

The arithmetic is that of `torchvision.transforms.v2.functional` on floats, except for the blur: that is the exact
Gaussian with replicated edges which Pillow's GaussianBlur (the original's) approximates. The original rounds to uint8
after every operation, this does not.

On CUDA nothing waits for the device: which samples an operation touches is decided on the host, and all index tensors
travel in one copy that does not block.

Shapes: N images, n those an operation touches, C channels, S x S image size.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dino.augmentation.jitter_matrix import LUMA, jitter_matrices
from dino.augmentation.views import JITTER_OPERATIONS, JITTER_ORDERS, NEUTRAL, PhotometricParameters

JitterForm = Literal["exact", "matrix"]

_BLUR_TILE: Final = 32  # output pixels per matrix product: small ones save arithmetic, large ones calls
BLUR_SIGMAS: Final = 4  # the Gaussian is cut at so many standard deviations
# Plans are made with NumPy: of arrays this small a call of torch takes longer than its arithmetic.
_ORDERS: Final = np.array([[JITTER_OPERATIONS.index(name) for name in order] for order in JITTER_ORDERS])
_NEUTRAL: Final = np.array([NEUTRAL[name] for name in JITTER_OPERATIONS], dtype=np.float32)


@dataclass(frozen=True)
class Application:
    """One operation on some of the images."""

    operation: str
    indices: Tensor  # [n] int64, which images
    values: Tensor  # [n] float32, the parameter of each; grayscale and solarize have none and ignore it


@dataclass(frozen=True)
class PhotometricSettings:
    """What is the same for all images."""

    mean: Sequence[float]  # of each channel, for values in [0, 1]
    std: Sequence[float]
    solarize_threshold: float  # images are solarized from this value on, in 0..255
    largest_blur_sigma: float  # of any image of any batch, in pixels; it decides how far filters reach
    jitter_form: JitterForm = "exact"

    def jitters_by_matrix(self, num_channels: int) -> bool:
        """Whether the jitter is one matrix; without three colours it never is."""
        return self.jitter_form == "matrix" and num_channels == len(LUMA)


def apply_photometric(
    images: Tensor, parameters: PhotometricParameters | None, settings: PhotometricSettings
) -> Tensor:
    """Turns uint8 images into what the network sees.

    Args:
        images: uint8 [N, C, S, S], on any device.
        parameters: each [N], on the host; None: the images are only normalised.

    Returns:
        float32 [N, C, S, S] on the device of `images`, normalised.
    """
    # Blur is a matrix product, which autocast would round to bfloat16.
    with torch.autocast(images.device.type, enabled=False):
        floats = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        if parameters is None:
            return _normalise(floats, settings.mean, settings.std)
        by_matrix = settings.jitters_by_matrix(images.shape[1])
        if by_matrix:
            floats = _jitter_by_matrix(floats, parameters)
        operations = _operations(settings)
        for part in to_device(plan(parameters, jitter=not by_matrix), images.device):
            operation = operations[part.operation]
            if len(part.indices) == len(floats):
                floats = operation(floats, part.values).contiguous()
            else:
                floats.index_copy_(0, part.indices, operation(floats.index_select(0, part.indices), part.values))
        return _normalise(floats, settings.mean, settings.std)


def plan(parameters: PhotometricParameters, *, jitter: bool = True) -> list[Application]:
    """What is applied to which images, in order; neutral operations are skipped.

    Args:
        parameters: each [N].
        jitter: with the four jitter operations.
    """
    parts = _plan_jitter(parameters) if jitter else []
    sigma, unused = parameters.blur_sigma.numpy(), parameters.hue.numpy()
    parts.append(_application("grayscale", parameters.grayscale.numpy(), unused))
    parts.append(_application("blur", sigma > 0, sigma))
    parts.append(_application("solarize", parameters.solarize.numpy(), unused))
    return [part for part in parts if len(part.indices)]


def _plan_jitter(parameters: PhotometricParameters) -> list[Application]:
    """Images whose n-th jitter operation is the same are handled at once."""
    factors = np.stack([getattr(parameters, name).numpy() for name in JITTER_OPERATIONS], axis=1)  # [N, 4]
    applied = factors != _NEUTRAL
    order = _ORDERS[parameters.order.numpy()]  # [N, 4], operation at each place
    applied_at = np.take_along_axis(applied, order, axis=1)
    # The turn of each operation of an image, from 1, not counting those that are neutral, which have 0.
    turn = np.empty_like(order)
    np.put_along_axis(turn, order, applied_at.cumsum(axis=1) * applied_at, axis=1)
    used = np.flatnonzero(applied.any(axis=0)).tolist()
    turns = itertools.product(range(1, len(used) + 1), used)
    return [_application(JITTER_OPERATIONS[o], turn[:, o] == k, factors[:, o]) for k, o in turns]


def _jitter_by_matrix(images: Tensor, parameters: PhotometricParameters) -> Tensor:
    """All of the jitter in one product for each image, clipped once."""
    matrices = jitter_matrices(parameters, images.mean(dim=(2, 3)))  # [N, 3, 4]
    flat = torch.baddbmm(matrices[:, :, 3:], matrices[:, :, :3], images.flatten(2))
    return flat.clamp_(0, 1).view_as(images)


def _application(operation: str, mask: NDArray[np.bool_], values: NDArray[np.float32]) -> Application:
    indices = np.flatnonzero(mask)
    return Application(operation, torch.from_numpy(indices), torch.from_numpy(values[indices]))


def to_device(parts: list[Application], device: torch.device) -> list[Application]:
    """The same with tensors on `device`, sent in two copies that do not block."""
    if device.type == "cpu" or not parts:
        return parts
    sizes = [len(part.indices) for part in parts]
    indices, values = torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])
    if device.type == "cuda":
        indices, values = indices.pin_memory(), values.pin_memory()
    indices, values = indices.to(device, non_blocking=True), values.to(device, non_blocking=True)
    split = zip(parts, torch.split(indices, sizes), torch.split(values, sizes), strict=True)
    return [Application(part.operation, of_part, its_values) for part, of_part, its_values in split]


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scales every value: [n, C, S, S] by [n]."""
    return (images * _per_image(factor)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Away from or towards the image's mean gray; without the three colours, its mean over all channels."""
    gray = _luma(images) if images.shape[1] == 3 else images
    return _blend(images, gray.mean(dim=(1, 2, 3), keepdim=True), factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Away from or towards the gray image."""
    return _blend(images, _luma(images), factor)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue of HSV by `shift` (1 = the whole circle), at the same saturation and value."""
    red, green, blue = images.unbind(dim=1)  # [n, S, S] each
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    divisor = torch.where(chroma == 0, 1, chroma)
    sector = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sector = sector + 6 * shift[:, None, None]
    turned = torch.empty_like(images)
    for channel, offset in enumerate((5, 3, 1)):
        k = (sector + offset).remainder_(6)
        # Falls from `value` by the chroma over a third of the circle.
        weight = torch.minimum(k, 4 - k).clamp_(0, 1)
        torch.sub(value, weight.mul_(chroma), out=turned[:, channel])
    return turned


def grayscale(images: Tensor) -> Tensor:
    """Three equal channels."""
    return _luma(images).expand_as(images)


def blur(images: Tensor, sigma: Tensor, reach: int) -> Tensor:
    """Gaussian blur with replicated edges, `sigma` [n] and `reach` (of the filter to each side) in pixels."""
    filters = blur_filters(sigma, reach, tile=min(_BLUR_TILE, images.shape[-1]))
    return _filter_across(_filter_across(images, filters, reach).transpose(2, 3), filters, reach).transpose(2, 3)


def blur_filters(sigma: Tensor, reach: int, tile: int) -> Tensor:
    """Weights of reach + tile + reach input pixels in `tile` output pixels: [n] -> [n, tile + 2 * reach, tile]."""
    offset = torch.arange(-reach, tile + reach, device=sigma.device)[:, None] - torch.arange(tile, device=sigma.device)
    exponent = -0.5 * (offset / sigma[:, None, None]).square()
    # What exp(-80) stands for is nothing in float32 already; smaller results are denormal, which is slow on CPUs.
    weights = exponent.clamp_(min=-80).exp_().masked_fill_(offset.abs() > reach, 0)
    return weights / weights.sum(dim=1, keepdim=True)


def _filter_across(images: Tensor, filters: Tensor, reach: int) -> Tensor:
    """Filters along the last side: one matrix product for each image, over tiles that overlap by twice the reach."""
    n, num_channels, height, width = images.shape
    tile = filters.shape[-1]
    num_tiles = -(-width // tile)
    padded = F.pad(images, (reach, reach + num_tiles * tile - width, 0, 0), mode="replicate")
    tiles = padded.unfold(-1, tile + 2 * reach, tile).reshape(n, num_channels * height * num_tiles, tile + 2 * reach)
    return torch.bmm(tiles, filters).view(n, num_channels, height, num_tiles * tile)[..., :width]


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Inverts values from `threshold` on."""
    return torch.where(images >= threshold, 1 - images, images)


def _normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std, without tensors that would have to be sent to the device."""
    channels = [channel.sub_(m).div_(s) for channel, m, s in zip(images.unbind(1), mean, std, strict=True)]
    assert len(channels) == images.shape[1]
    return images


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _luma(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(dim=1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[:, None]  # [n, 1, S, S]


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other.expand_as(images), images, _per_image(factor)).clamp_(0, 1)


def _operations(settings: PhotometricSettings) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Every operation as a function of images [n, C, S, S] and one parameter each [n], unused where it has none."""
    threshold = settings.solarize_threshold / 255
    reach = math.ceil(BLUR_SIGMAS * settings.largest_blur_sigma)
    return {
        "brightness": brightness,
        "contrast": contrast,
        "saturation": saturation,
        "hue": hue,
        "grayscale": lambda images, _: grayscale(images),
        "blur": lambda images, sigma: blur(images, sigma, reach),
        "solarize": lambda images, _: solarize(images, threshold),
    }
