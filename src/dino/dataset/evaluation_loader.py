"""Images as evaluation sees them: resized, cut from the centre, nothing random.

Shape legend: N images in the batch, C channels, H x W pixels.
"""

import logging
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dino.dataset.source import Source, UnreadableImage
from dino.dataset.workers import BatchReader, iterate

log = logging.getLogger("dino")


class EvaluationLoader:
    """Gives all images of `source` once, in order, as (uint8 [N, C, size, size], labels int64 [N] or None).

    The short side is resized to `resize`, then a square of `size` is cut from the centre (the original: eval_knn.py,
    Resize(256, bicubic) and CenterCrop(224)). Images that cannot be read are named in the log and left out.

    Args:
        source: the images.
        size: side of the square [pixels].
        resize: short side before the cut [pixels].
        batch_size: N; the last batch may be smaller.
        num_workers: loader processes; 0 loads in the main process.
    """

    def __init__(self, source: Source, size: int, resize: int, batch_size: int, num_workers: int) -> None:
        assert 0 < size <= resize
        self._source = source
        self._reader = _ImageReader(source, size, resize)
        self._batch_size = batch_size
        self._num_workers = num_workers

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self._source) // self._batch_size)

    @property
    def num_images(self) -> int:
        """Those that cannot be read count as well."""
        return len(self._source)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        indices = np.arange(len(self._source), dtype=np.int64)
        batches = [indices[start : start + self._batch_size] for start in range(0, len(indices), self._batch_size)]
        for images, shown, failures in iterate(self._reader, batches, num_workers=self._num_workers):
            for failure in failures:
                log.warning("unreadable image, left out of the evaluation: %s", failure)
            if len(shown):
                labels = self._source.labels
                yield images, None if labels is None else torch.from_numpy(labels[shown])


class _ImageReader(BatchReader[tuple[Tensor, NDArray[np.int64], list[str]]]):
    """Images [N, C, size, size] of a batch, their indices [N], and what could not be read."""

    def __init__(self, source: Source, size: int, resize: int) -> None:
        self.source = source
        self.size = size
        self.resize = resize

    def __getitem__(self, indices: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64], list[str]]:
        if self.source.images is not None:
            images = self.source.images[torch.from_numpy(indices)]
            return resize_and_cut(images, self.resize, self.size), indices, []
        squares, shown, failures = [], [], []
        for index in indices.tolist():
            try:
                image = self.source.read(index)
            except UnreadableImage as error:
                failures.append(str(error))
                continue
            squares.append(resize_and_cut(image.unsqueeze(0), self.resize, self.size))
            shown.append(index)
        images = torch.cat(squares) if squares else torch.empty(0, dtype=torch.uint8)
        return images, np.array(shown, dtype=np.int64), failures


def resize_and_cut(images: Tensor, resize: int, size: int) -> Tensor:
    """The short side to `resize`, bicubic and antialiased as PIL, then a square from the centre.

    uint8 [N, C, H, W] to [N, C, size, size]. Sizes and the place of the cut are rounded as torchvision's Resize and
    CenterCrop do.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    new_height, new_width = resize * height // short, resize * width // short
    if (new_height, new_width) != (height, width):
        # Integer arithmetic on uint8 images, so the batch size cannot change a pixel.
        images = F.interpolate(images, (new_height, new_width), mode="bicubic", antialias=True, align_corners=False)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return images[..., top : top + size, left : left + size].contiguous()
