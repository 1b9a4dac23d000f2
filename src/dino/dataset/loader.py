"""The training loader: sampler, images and views together, with any number of workers.

Shape legend: B images in the batch, N images of the dataset, C channels, H x W pixels.
"""

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino.augmentation.multicrop import MultiCrop
from dino.augmentation.views import PhotometricParameters, ViewBatch
from dino.dataset.base import ImageDataset
from dino.dataset.sampler import ShuffledSampler
from dino.dataset.source import Source, UnreadableImage
from dino.dataset.workers import BatchReader, iterate
from dino.ranks import gather_objects

log = logging.getLogger("dino")

NUM_LISTED = 20  # unreadable images that an error message lists


class TrainLoader:
    """Batches of views in the order of the sampler, the same with any number of workers.

    An image that cannot be read is replaced by the next one that can, (i + 1) % N and so on, in every epoch alike. It
    is named in the log once, counted, and reported in `ViewBatch.bad`.

    Args:
        dataset: gives the training images, batch size, number of workers and share of bad images.
        augmentation: makes the views.
        seed: seed of the run: order and views follow from it.
        rank: this process, from 0.
        world_size: number of processes.
        pin_memory: batches come in page-locked memory, for copies to a CUDA device that do not wait.

    Raises:
        ValueError: there are not enough images for one batch.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        augmentation: MultiCrop,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self._source = dataset.train()
        self._sampler = ShuffledSampler(len(self._source), dataset.batch_size, seed, rank, world_size)
        self._augmentation = augmentation
        self._num_workers = dataset.num_workers
        self._scaled_decoding = dataset.scaled_decoding
        self._max_bad_fraction = dataset.max_bad_fraction
        self._pin_memory = pin_memory
        self.bad_images: dict[int, str] = {}

    @property
    def batch_size(self) -> int:
        """B, images per process and batch."""
        return self._sampler.batch_size

    @property
    def num_batches(self) -> int:
        """Batches of one epoch, of this process."""
        return self._sampler.num_batches

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[ViewBatch]:
        """The batches of one epoch from `first_batch` on, each [G, B, C, H, W] and [L, B, C, h, w].

        Raises:
            ValueError: more than `dataset.max_bad_fraction` of the images turned out to be unreadable.
        """
        reader = _ViewReader(
            self._source,
            self._augmentation,
            self._sampler.seed,
            epoch,
            self._max_bad,
            scaled=self._scaled_decoding,
            packed=self._num_workers > 0,
        )
        batches = list(self._sampler.batches(epoch, first_batch))
        for made in iterate(reader, batches, num_workers=self._num_workers, pin_memory=self._pin_memory):
            self._count(made.bad)
            assert made.views is not None, "a batch without views has too many bad images, which _count refuses"
            yield made.views.unpack() if isinstance(made.views, _PackedViews) else made.views

    def share_bad_images(self) -> None:
        """Tells all ranks of the unreadable images that each has met; every rank must call it.

        Raises:
            ValueError: on every rank, if they are together more than `dataset.max_bad_fraction`.
        """
        met = {index: reason for bad in gather_objects(self.bad_images) for index, reason in bad.items()}
        self.bad_images = dict(sorted(met.items()))  # in one order, however often and when they are shared
        self._refuse_too_many()

    def state_dict(self) -> dict[str, Any]:
        """The unreadable images met so far: a resumed run goes on counting."""
        return {"bad_images": dict(self.bad_images)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bad_images = dict(state["bad_images"])

    @property
    def _max_bad(self) -> float:
        return self._max_bad_fraction * len(self._source)

    def _count(self, bad: dict[int, str]) -> None:
        for index, reason in bad.items():
            if index not in self.bad_images:
                self.bad_images[index] = reason
                log.warning("unreadable image, replaced by the next one: %s: %s", self._source.name(index), reason)
        self._refuse_too_many()

    def _refuse_too_many(self) -> None:
        # Whatever the share, a set without one readable image stops the run.
        if len(self.bad_images) > self._max_bad or len(self.bad_images) == len(self._source):
            raise ValueError(self._complaint())

    def _complaint(self) -> str:
        listed = [
            f"{self._source.name(index)} ({reason})" for index, reason in list(self.bad_images.items())[:NUM_LISTED]
        ]
        rest = len(self.bad_images) - len(listed)
        return (
            f"{len(self.bad_images)} of {len(self._source)} training images cannot be read, more than "
            f"dataset.max_bad_fraction={self._max_bad_fraction:g} allows: {', '.join(listed)}"
            + (f" and {rest} more" if rest else "")
        )


@dataclass(frozen=True)
class _PackedViews:
    """A ViewBatch on its way between processes.

    Each tensor that is sent takes an open file on both sides, and many workers with some ten tensors a batch run into
    the limit ("received 0 items of ancdata"). So only the images are sent as tensors; all else as plain arrays.
    """

    global_views: Tensor
    local_views: Tensor | None
    indices: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    parameters: dict[str, NDArray[Any]] | None
    bad: tuple[int, ...]

    @classmethod
    def pack(cls, views: ViewBatch) -> "_PackedViews":
        parameters = None
        if views.parameters is not None:
            names = [field.name for field in dataclasses.fields(views.parameters)]
            parameters = {name: getattr(views.parameters, name).numpy() for name in names}
        labels = None if views.labels is None else views.labels.numpy()
        return cls(views.global_views, views.local_views, views.indices.numpy(), labels, parameters, views.bad)

    def unpack(self) -> ViewBatch:
        parameters = None
        if self.parameters is not None:
            tensors = {name: torch.from_numpy(values) for name, values in self.parameters.items()}
            parameters = PhotometricParameters(**tensors)
        return ViewBatch(
            global_views=self.global_views,
            local_views=self.local_views,
            indices=torch.from_numpy(self.indices),
            labels=None if self.labels is None else torch.from_numpy(self.labels),
            parameters=parameters,
            bad=self.bad,
        )


@dataclass(frozen=True)
class _Made:
    """What a worker gives back: views, and the bad images with their reasons; no views if these are too many."""

    views: ViewBatch | _PackedViews | None
    bad: dict[int, str]

    def pin_memory(self) -> "_Made":
        """Called by the DataLoader's pinning thread."""
        if self.views is None:
            return self
        views = self.views.unpack() if isinstance(self.views, _PackedViews) else self.views
        return _Made(views.pin_memory(), self.bad)


class _ViewReader(BatchReader[_Made]):
    """Reads the images of one batch and makes their views: a function of its arguments and of the indices.

    With `augmentation.photometric_device=cpu` the photometric part runs here too, in the workers.
    """

    def __init__(
        self,
        source: Source,
        augmentation: MultiCrop,
        seed: int,
        epoch: int,
        max_bad: float,
        *,
        scaled: bool,
        packed: bool,
    ) -> None:
        self.source = source
        self.augmentation = augmentation
        self.seed = seed
        self.epoch = epoch
        self.max_bad = max_bad
        self.scaled = scaled
        self.packed = packed

    def __getitem__(self, indices: NDArray[np.int64]) -> _Made:
        bad: dict[int, str] = {}
        images: Tensor | list[Tensor]
        sizes: NDArray[np.int64] | None = None
        if self.source.images is not None:
            images = self.source.images[torch.from_numpy(indices)]
        else:
            found = self._read_all(indices, bad)
            if found is None:
                return _Made(None, bad)
            images, indices, sizes = found
        labels = None if self.source.labels is None else torch.from_numpy(self.source.labels[indices])
        views = self.augmentation.views(
            images, indices, self.seed, self.epoch, labels=labels, bad=tuple(bad), sizes=sizes
        )
        if self.augmentation.photometric_device == "cpu":
            views = self.augmentation.colour(views)
        return _Made(_PackedViews.pack(views) if self.packed else views, bad)

    def _read_all(
        self, indices: NDArray[np.int64], bad: dict[int, str]
    ) -> tuple[list[Tensor], NDArray[np.int64], NDArray[np.int64]] | None:
        """Images, their indices and whole sizes [B, 2], with replacements; None once this batch has too many bad."""
        images, shown, sizes = [], [], []
        for wanted in indices.tolist():
            index = wanted
            while True:
                try:
                    image, size = self._read(index)
                    break
                except UnreadableImage as error:
                    bad[index] = error.cause
                if len(bad) > self.max_bad or len(bad) == len(self.source):
                    return None
                index = (index + 1) % len(self.source)
            images.append(image)
            shown.append(index)
            sizes.append(size)
        return images, np.array(shown, dtype=np.int64), np.array(sizes, dtype=np.int64)

    def _read(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        """One image, as small as its crops allow if that is asked for, and the size of the whole."""
        if not self.scaled:
            image = self.source.read(index)
            return image, (image.shape[-2], image.shape[-1])
        size = self.source.size(index)
        return self.source.read(index, self.augmentation.reduction(index, size, seed=self.seed, epoch=self.epoch)), size
