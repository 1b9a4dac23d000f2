"""Sources: indexed images, in memory or in files.

Shape legend: N images, C channels, H x W pixels.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import UnidentifiedImageError
from torch import Tensor

from dino.dataset.decode import ChannelMismatch, convert_channels, decode, image_size, stored_mode

Labels = NDArray[np.int64]

NUM_FINGERPRINTED = 2000  # images of a set in memory that its fingerprint looks at; all would take seconds

_GOLDEN_RATIO = 0.6180339887498949


class UnreadableImage(ValueError):  # noqa: N818  reads as what it is
    """An image that cannot be used: `name` says which, `cause` why."""

    def __init__(self, name: str, cause: str) -> None:
        super().__init__(name, cause)  # both, so that it survives being pickled by a worker
        self.name = name
        self.cause = cause

    def __str__(self) -> str:
        return f"{self.name}: {self.cause}"


class Source(Protocol):
    """Images by index, with labels where they are known."""

    @property
    def labels(self) -> Labels | None:
        """[N] class indices from 0, or None."""

    @property
    def images(self) -> Tensor | None:
        """uint8 [N, C, H, W] for a set that lies in memory, else None."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The path of an image, or a name like `digits[12]`."""

    def size(self, index: int) -> tuple[int, int]:
        """Height and width, known without decoding [pixels].

        Raises:
            UnreadableImage: as `read`.
        """

    def read(self, index: int, reduction: int = 1) -> Tensor:
        """uint8 [C, H, W]; H and W may be `reduction` (1, 2, 4 or 8) times smaller where that is cheaper to decode.

        Raises:
            UnreadableImage: the image is missing, broken or of a kind that is not understood.
        """

    def mode(self, index: int) -> str:
        """How the pixels are stored, for reports: `RGB`, `L`, `uint16 x 5` ..."""

    def fingerprint(self) -> str:
        """Hash that tells sources apart: of pixels in memory, or of the paths below the root."""


class StackedSource:
    """A set in memory.

    Args:
        images: uint8 [N, C, H, W].
        labels: [N] class indices, or None.
        prefix: name of the set; images are called `prefix[index]`.
    """

    def __init__(self, images: Tensor, labels: Labels | None, prefix: str) -> None:
        assert images.dtype == torch.uint8
        assert images.ndim == 4
        assert labels is None or len(labels) == len(images)
        self.images = images
        self.labels = labels
        self.prefix = prefix

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.prefix}[{index}]"

    def size(self, index: int) -> tuple[int, int]:
        return self.images.shape[-2], self.images.shape[-1]

    def read(self, index: int, reduction: int = 1) -> Tensor:
        return self.images[index]

    def mode(self, index: int) -> str:
        return {1: "L", 3: "RGB"}.get(self.images.shape[1], f"uint8 x {self.images.shape[1]}")

    def fingerprint(self) -> str:
        some = self.images[torch.from_numpy(spread_indices(len(self), NUM_FINGERPRINTED))]
        return _digest(str(list(self.images.shape)).encode(), some.contiguous().numpy().tobytes())


class FileSource:
    """Image files.

    The paths are held as one array of bytes: a Python list of strings would be copied page by page into every
    worker, because reading an object writes its reference count.

    Args:
        paths: array of str [N], relative to `root`; absolute paths stay as they are.
        labels: [N] class indices, or None.
        channels: number of channels that `read` gives, see `decode`.
        root: folder that the paths start from; None: the working directory.
    """

    images: None = None

    def __init__(
        self, paths: NDArray[np.str_], labels: Labels | None, channels: int, *, root: Path | None = None
    ) -> None:
        assert labels is None or len(labels) == len(paths)
        self._paths = np.array([os.fsencode(str(path)) for path in paths], dtype=np.bytes_)
        self._root = Path() if root is None else root
        self._channels = channels
        self.labels = labels

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> Path:
        return self._root / os.fsdecode(self._paths[index].item())

    def name(self, index: int) -> str:
        return str(self.path(index))

    def size(self, index: int) -> tuple[int, int]:
        with _naming(self.path(index)):
            return image_size(self.path(index))

    def read(self, index: int, reduction: int = 1) -> Tensor:
        with _naming(self.path(index)):
            return decode(self.path(index), self._channels, reduction)

    def mode(self, index: int) -> str:
        return stored_mode(self.path(index))

    def fingerprint(self) -> str:
        return _digest(str(self._channels).encode(), self._paths.tobytes())


class SubsetSource:
    """The images of another source at `indices` [M], in that order."""

    def __init__(self, source: Source, indices: NDArray[np.int64]) -> None:
        self._source = source
        self._indices = np.asarray(indices, dtype=np.int64)
        self.labels = None if source.labels is None else source.labels[self._indices]

    @cached_property
    def images(self) -> Tensor | None:
        images = self._source.images
        return None if images is None else images[torch.from_numpy(self._indices)]

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def size(self, index: int) -> tuple[int, int]:
        return self._source.size(int(self._indices[index]))

    def read(self, index: int, reduction: int = 1) -> Tensor:
        return self._source.read(int(self._indices[index]), reduction)

    def mode(self, index: int) -> str:
        return self._source.mode(int(self._indices[index]))

    def fingerprint(self) -> str:
        return _digest(self._source.fingerprint().encode(), self._indices.tobytes())


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever goes wrong with the file becomes an UnreadableImage that says which it is, and why."""
    try:
        yield
    except MemoryError:
        raise
    except ChannelMismatch as error:
        raise UnreadableImage(str(path), str(error)) from error
    except FileNotFoundError as error:
        raise UnreadableImage(str(path), "the file does not exist") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(str(path), "PIL does not know its format, or its first bytes are broken") from error
    except Exception as error:  # PIL's plugins raise nearly any type on a broken file
        raise UnreadableImage(str(path), f"{error}" or type(error).__name__) from error


def stacked(images: Tensor, labels: Labels | None, prefix: str, channels: int) -> StackedSource:
    """A set in memory with `channels` channels: gray is repeated to colour, colour becomes luminance.

    Raises:
        ValueError: the images cannot be brought to so many channels.
    """
    try:
        return StackedSource(convert_channels(images, channels), labels, prefix)
    except ChannelMismatch as error:
        raise ValueError(f"{prefix} cannot be used with dataset.channels={channels}: {error}") from error


def spread_indices(size: int, limit: int | None) -> NDArray[np.int64]:
    """At most `limit` of the indices 0 to size - 1, ascending, one from each of `limit` equal stretches.

    The first ones would be of one class where a split is sorted by class. The place within a stretch moves by the
    golden ratio, so that a split whose classes alternate is covered evenly too.
    """
    if limit is None or limit >= size:
        return np.arange(size, dtype=np.int64)
    if limit < 1:
        raise ValueError(f"a limit of {limit} images: use at least 1")
    borders = np.arange(limit + 1, dtype=np.int64) * size // limit
    place = np.arange(limit) * _GOLDEN_RATIO % 1.0
    offsets: NDArray[np.int64] = np.floor(place * np.diff(borders)).astype(np.int64)
    return borders[:-1] + offsets


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]
