"""From a file to a uint8 tensor [C, H, W].

Shape legend: C channels, H x W pixels.
"""

import io
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

ARRAY_SUFFIX = ".npy"
_END_OF_JPEG: Final = b"\xff\xd9"  # it cannot occur among the coded pixels, so a file that ends in it is not cut short


class ChannelMismatch(ValueError):  # noqa: N818  reads as what it is
    """A readable image that cannot be brought to `dataset.channels`."""


def decode(path: Path, channels: int, reduction: int = 1) -> Tensor:
    """Reads one image file as uint8 [C, H, W] with `channels` channels.

    As torchvision's ImageFolder in the original (main_dino.py, `datasets.ImageFolder`) a colour image is what PIL's
    `convert("RGB")` gives, and the EXIF orientation is not applied. Beyond it: one channel is `convert("L")`, 16-bit
    images are brought to 8 bit by the range of their type (0..65535 becomes 0..255), and other numbers of channels
    are taken from files that hold exactly so many, such as `.npy` arrays [H, W, C] of uint8 or uint16.

    Gray and colour JPEGs are decoded by OpenCV, which is faster and gives PIL's pixels; PIL decodes everything else,
    and has the last word on files that OpenCV refuses.

    Args:
        reduction: 1, 2, 4 or 8: a JPEG is decoded so many times smaller, sides rounded up; other files as they are.

    Raises:
        ChannelMismatch: the file has another number of channels.
        Exception: whatever PIL or NumPy raise for a file that is broken.
    """
    if path.suffix.lower() == ARRAY_SUFFIX:
        return convert_channels(_decode_array(path), channels)
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:  # reads the header only
        if channels in (1, 3) and _is_plain_jpeg(image, content):
            pixels = _decode_jpeg(content, image.mode, reduction)
            if pixels is not None:
                return convert_channels(_as_tensor(pixels), channels)
        return _decode_pillow(image, channels)


def decode_or_explain(path: Path, channels: int, key: str) -> Tensor:
    """As `decode`, for images that cannot be done without.

    Raises:
        ValueError: if it cannot be read; `key` opens the message.
    """
    try:
        return decode(path, channels)
    except Exception as error:  # decoders have many kinds
        unknown = isinstance(error, UnidentifiedImageError)  # whose own words name an object in memory
        reason = "PIL does not know its format" if unknown else error
        raise ValueError(f"{key}: {path} cannot be read as an image ({reason})") from error


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file, from its header [pixels].

    Raises:
        Exception: whatever PIL or NumPy raise for a file that is broken.
    """
    if path.suffix.lower() == ARRAY_SUFFIX:
        shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
        return int(shape[0]), int(shape[1])
    with Image.open(path) as image:
        return image.height, image.width


def stored_mode(path: Path) -> str:
    """How the file holds its pixels: PIL's mode (`RGB`, `L`, `I;16` ...), or type and channels of an array."""
    if path.suffix.lower() == ARRAY_SUFFIX:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        return f"{array.dtype.name} x {array.shape[2] if array.ndim == 3 else 1}"
    with Image.open(path) as image:
        return image.mode


def convert_channels(images: Tensor, channels: int) -> Tensor:
    """Brings uint8 [..., C, H, W] to `channels` channels: gray is repeated to colour, colour becomes PIL's luminance.

    Raises:
        ChannelMismatch: for any other change.
    """
    present = images.shape[-3]
    if present == channels:
        return images
    if present == 1 and channels == 3:
        return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
    if present == 3 and channels == 1:
        # ITU-R 601 in 16-bit fixed point, as in PIL's convert("L").
        red, green, blue = images.to(torch.int32).unbind(-3)
        return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8).unsqueeze(-3)
    raise ChannelMismatch(f"it has {present} channels, not dataset.channels={channels}")


def _decode_array(path: Path) -> Tensor:
    array = np.load(path, allow_pickle=False)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.size == 0:
        raise ValueError(f"an array of shape {list(array.shape)} where [H, W, C] or [H, W] was expected")
    return _as_tensor(_to_uint8(array))


def _is_plain_jpeg(image: Image.Image, content: bytes) -> bool:
    return image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and content.endswith(_END_OF_JPEG)


def _decode_jpeg(content: bytes, mode: str, reduction: int) -> NDArray[np.uint8] | None:
    """uint8 [H, W, C] as the file holds it, gray (mode `L`) or colour; None if it is broken."""
    import cv2  # here: it takes a tenth of a second, and images in memory never need it

    reduced = {
        1: 0,
        2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
        4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
        8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
    }
    colours = cv2.IMREAD_GRAYSCALE if mode == "L" else cv2.IMREAD_COLOR_RGB
    flags = colours | reduced[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels: Any = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), flags)
    except cv2.error:
        return None
    return None if pixels is None else pixels.reshape(*pixels.shape[:2], -1)


def _decode_pillow(image: Image.Image, channels: int) -> Tensor:
    # PIL's own conversion would clip 16-bit pixels at 255. A 16-bit PNG may also come as the 32-bit mode "I".
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        pixels = np.asarray(image)
        gray = Image.fromarray(_to_uint8(pixels.clip(0, 65535).astype(np.uint16)))
        return _convert_pillow(gray, channels)
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) where 8 or 16 bit were expected")
    return _convert_pillow(image, channels)


def _convert_pillow(image: Image.Image, channels: int) -> Tensor:
    if channels in (1, 3):
        image = image.convert("L" if channels == 1 else "RGB")
    elif len(image.getbands()) != channels:
        raise ChannelMismatch(f"it has {len(image.getbands())} channels, not dataset.channels={channels}")
    array = np.array(image)
    return _as_tensor(array if array.ndim == 3 else array[:, :, None])


def _to_uint8(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array.view(np.uint8)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257, rounded
    raise ValueError(f"{array.dtype.name} pixels where uint8 or uint16 were expected")


def _as_tensor(array: NDArray[np.uint8]) -> Tensor:
    """[H, W, C] to a [C, H, W] view of the same memory: channels last, which resizing prefers."""
    return torch.from_numpy(array).permute(2, 0, 1)
