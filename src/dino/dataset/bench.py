"""How fast training images are read, decoded, cropped and coloured, and how many workers a training step needs.

Shape legend: B images in the batch.
"""

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino.augmentation import MultiCrop, ViewBatch
from dino.dataset.base import ImageDataset
from dino.dataset.loader import TrainLoader
from dino.dataset.sampler import ShuffledSampler
from dino.dataset.source import Source, UnreadableImage

MAX_IMAGES: Final = 64  # of a batch whose stages are timed one by one
FEW_STEPS: Final = 3  # at least, whatever the time they take
GOOD_ENOUGH: Final = 0.95  # of the fastest: more workers than that takes are not advised
SMALL_WAIT: Final = 0.1  # share of a step's time; fewer workers that keep to it are preferred to more
LITTLE_MORE: Final = 0.02  # of that share, where no number of workers keeps to it


@dataclass(frozen=True)
class LoaderSpeed:
    """The loader alone, nothing training beside it."""

    num_workers: int
    images_per_s: float
    wait_share: float | None  # of the time of a step, waiting for views included; None without a step


@dataclass(frozen=True)
class BenchReport:
    """What was measured. Stages are those of one core, in seconds per image."""

    name: str
    device: str
    batch_size: int
    num_cores: int
    photometric_device: str
    in_memory: bool
    stages: dict[str, float]
    loaders: list[LoaderSpeed]
    step_s: float | None  # one step of `batch_size` images on the device
    advised_workers: int

    @property
    def limit(self) -> str:
        """The stage that takes longest."""
        return max(self.stages, key=self.stages.__getitem__)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"limit": self.limit}

    def rows(self) -> list[tuple[str, str]]:
        """What was measured, in words."""
        place = "in memory" if self.in_memory else "in files"
        rows = [("images", f"{self.name}, {place}; batches of {self.batch_size}, training on {self.device}")]
        rows += [
            (stage, f"{1 / seconds:,.0f} images/s on one core ({seconds * 1e3:.3f} ms)")
            for stage, seconds in self.stages.items()
        ]
        rows.append(("limit", f"{self.limit} takes {self.stages[self.limit] / sum(self.stages.values()):.0%} of that"))
        rows += [(_workers(loader.num_workers), self._loader_in_words(loader)) for loader in self.loaders]
        if self.step_s is not None:
            rows.append(("step", f"{self.batch_size / self.step_s:,.1f} images/s ({self.step_s * 1e3:.0f} ms)"))
        return [*rows, ("advice", self._advice())]

    def _loader_in_words(self, loader: LoaderSpeed) -> str:
        text = f"{loader.images_per_s:,.0f} images/s"
        return text if loader.wait_share is None else f"{text}; a step waits {loader.wait_share:.0%} of its time"

    def _advice(self) -> str:
        advice = f"dataset.num_workers={self.advised_workers} (of {self.num_cores} usable cores)"
        if self.advised_workers and self.device == "cpu":
            advice += "; workers and training share the cores, so trainer.num_threads should leave them some"
        best = next(loader for loader in self.loaders if loader.num_workers == self.advised_workers)
        if best.wait_share is not None and best.wait_share > SMALL_WAIT:
            advice += f"; still {best.wait_share:.0%} of the time is waiting"
        return f"{advice}; {self._faster()}" if self._faster() else advice

    def _faster(self) -> str:
        """What would make the limiting stage faster, if a setting does."""
        if self.limit == "decode":
            return "decoding is the limit: smaller files help, or dataset.scaled_decoding=true for large photos"
        if self.limit != "photometric" or self.in_memory:
            return ""
        if self.photometric_device == "device":
            return "" if self.device != "cpu" else "augmentation.photometric_device=cpu is faster for photos on a CPU"
        return "" if self.device == "cpu" else "augmentation.photometric_device=device leaves colours to the device"


def bench(
    dataset: ImageDataset,
    augmentation: MultiCrop,
    device: torch.device,
    *,
    seed: int,
    seconds: float,
    step: Callable[[ViewBatch], object] | None = None,
    worker_counts: Sequence[int] | None = None,
    tell: Callable[[str], object] = lambda what: None,
) -> BenchReport:
    """Measures the stages on one core, the loader with several numbers of workers, and `step` if it is given.

    Args:
        seconds: about how long each of these is measured.
        step: one training step on float views on `device`; its results are of no interest.
        worker_counts: numbers of workers to try, until more bring nothing; None: 0, 1, 2, 4 ... and all usable cores.
        tell: is told what is measured next.

    Raises:
        ValueError: there are not enough images for one batch, or none of a batch can be read.
    """
    source, num_cores = dataset.train(), len(os.sched_getaffinity(0))
    tell("stages, on one core")
    stages, views = _stages(source, dataset, augmentation, device, seed, seconds)

    def hand_over() -> ViewBatch:
        """What the main process does between the loader and the step, with all threads that it has."""
        return augmentation.photometric(views.to(device, non_blocking=True))

    handing_over_s = _seconds(hand_over, seconds / 4, device) * dataset.batch_size / len(views.indices)
    if step is not None:
        tell("training steps")
    step_times = None if step is None else _step_seconds(step, hand_over(), dataset.batch_size, device, seconds)
    loaders = []
    for num_workers in worker_counts if worker_counts is not None else counts_to_try(num_cores):
        tell(f"loader, {_workers(num_workers)}")
        batch_s = _loader_seconds(dataset, augmentation, device, seed, num_workers, seconds)
        loaders.append(
            LoaderSpeed(
                num_workers,
                dataset.batch_size / batch_s,
                None if step_times is None else wait_share(batch_s, handing_over_s, *step_times, num_workers),
            )
        )
        if _enough(loaders):
            break
    return BenchReport(
        name=dataset.name,
        device=device.type,
        batch_size=dataset.batch_size,
        num_cores=num_cores,
        photometric_device=augmentation.photometric_device,
        in_memory=source.images is not None,
        stages=stages,
        loaders=loaders,
        step_s=None if step_times is None else step_times[0],
        advised_workers=advised(loaders),
    )


def counts_to_try(num_cores: int) -> list[int]:
    """0, the powers of two below the number of cores, and that number."""
    powers = [2**exponent for exponent in range(num_cores.bit_length()) if 2**exponent < num_cores]
    return [0, *powers, num_cores]


def wait_share(batch_s: float, handing_over_s: float, step_s: float, queueing_s: float, num_workers: int) -> float:
    """The share of a step's time, waiting included, for which it waits for its views.

    The main process queues a step and hands over the views of the next one; without workers it also makes them. On a
    CPU queueing a step is the whole of it; on a GPU the rest happens while the step runs (`training/prefetch.py`).
    Workers make the next batches beside all of that.
    """
    in_main_s = queueing_s + handing_over_s + (batch_s if num_workers == 0 else 0.0)
    in_workers_s = batch_s if num_workers else 0.0
    return 1 - step_s / max(step_s, in_main_s, in_workers_s)


def advised(loaders: Sequence[LoaderSpeed]) -> int:
    """The smallest number of workers that is nearly as good as the best one."""
    shares = [loader.wait_share for loader in loaders if loader.wait_share is not None]
    if shares:
        enough = max(SMALL_WAIT, min(shares) + LITTLE_MORE)
        return min(x.num_workers for x in loaders if x.wait_share is not None and x.wait_share <= enough)
    fastest = max(loader.images_per_s for loader in loaders)
    return min(loader.num_workers for loader in loaders if loader.images_per_s >= GOOD_ENOUGH * fastest)


def _enough(loaders: Sequence[LoaderSpeed]) -> bool:
    """Whether more workers need not be tried: a step hardly waits, or the last ones brought nothing."""
    *before, last = loaders
    if last.num_workers == 0:
        return False
    if last.wait_share is not None and last.wait_share <= SMALL_WAIT:
        return True
    fewer = max((loader.images_per_s for loader in before if loader.num_workers), default=0.0)
    return GOOD_ENOUGH * last.images_per_s < fewer


# ---------------------------------------------------------------------- measuring


def _stages(
    source: Source, dataset: ImageDataset, augmentation: MultiCrop, device: torch.device, seed: int, seconds: float
) -> tuple[dict[str, float], ViewBatch]:
    """Seconds per image of each stage, on one core, and views of the images that were timed, as the loader has them."""
    sampler = ShuffledSampler(len(source), min(dataset.batch_size, MAX_IMAGES, len(source)), seed)
    indices = next(iter(sampler.batches(0)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _stages_of(source, dataset, augmentation, device, seed, seconds, indices)
    finally:
        torch.set_num_threads(threads)


def _stages_of(
    source: Source,
    dataset: ImageDataset,
    augmentation: MultiCrop,
    device: torch.device,
    seed: int,
    seconds: float,
    indices: NDArray[np.int64],
) -> tuple[dict[str, float], ViewBatch]:
    stages: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        stages[stage] = _seconds(work, seconds / 4, device) / len(indices)
        return work()

    sizes: NDArray[np.int64] | None = None
    images: Tensor | list[Tensor]
    if source.images is not None:
        stack = source.images
        images = timed("read", lambda: stack[torch.from_numpy(indices)])
    else:
        indices = _readable(source, indices)
        reductions = [1] * len(indices)
        if dataset.scaled_decoding:
            sizes = np.array([source.size(int(index)) for index in indices], dtype=np.int64)
            reductions = [
                augmentation.reduction(int(index), (int(height), int(width)), seed=seed, epoch=0)
                for index, (height, width) in zip(indices, sizes, strict=True)
            ]
        timed("read", lambda: [Path(source.name(int(index))).read_bytes() for index in indices])
        images = timed("decode", lambda: [source.read(int(i), r) for i, r in zip(indices, reductions, strict=True)])
        stages["decode"] = max(stages["decode"] - stages["read"], 0.0)
    views = timed("crop", lambda: augmentation.views(images, indices, seed, 0, sizes=sizes))
    if augmentation.photometric_device == "cpu":
        views = timed("photometric", lambda: augmentation.colour(views))
    loaded = views.pin_memory() if device.type == "cuda" else views
    if device.type != "cpu":
        views = timed("transfer", lambda: loaded.to(device, non_blocking=True))
    timed(
        "normalise" if augmentation.photometric_device == "cpu" else "photometric",
        lambda: augmentation.photometric(views),
    )
    return stages, loaded


def _readable(source: Source, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    def can_be_read(index: int) -> bool:
        try:
            source.read(index)
        except UnreadableImage:
            return False
        return True

    found = np.array([index for index in indices.tolist() if can_be_read(index)], dtype=np.int64)
    if not len(found):
        raise ValueError(f"none of {len(indices)} training images can be read; look with `dino data check`")
    return found


def _loader_seconds(
    dataset: ImageDataset, augmentation: MultiCrop, device: torch.device, seed: int, num_workers: int, seconds: float
) -> float:
    """Seconds per batch that the loader needs once it runs."""
    dataset = copy.copy(dataset)
    dataset.num_workers = num_workers
    loader = TrainLoader(dataset, augmentation, seed=seed, pin_memory=device.type == "cuda")
    batches = _endless(loader)
    for _ in range(max(1, num_workers)):  # every worker has made a batch
        next(batches)
    started, count = time.perf_counter(), 0
    while count < FEW_STEPS or time.perf_counter() - started < seconds:
        next(batches)
        count += 1
    return (time.perf_counter() - started) / count


def _endless(loader: TrainLoader) -> Iterator[ViewBatch]:
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def _step_seconds(
    step: Callable[[ViewBatch], object], views: ViewBatch, batch_size: int, device: torch.device, seconds: float
) -> tuple[float, float]:
    """Seconds of one step on `batch_size` images, those of `views`, repeated; and until the host has queued it."""
    chosen = torch.arange(batch_size) % len(views.indices)

    def of(images: Tensor) -> Tensor:
        return images.index_select(1, chosen.to(images.device))

    batch = ViewBatch(
        global_views=of(views.global_views),
        local_views=None if views.local_views is None else of(views.local_views),
        indices=views.indices.cpu()[chosen].to(device),
        labels=None,
        parameters=None,
        bad=(),
    )
    queueing: list[float] = []

    def queue() -> None:
        started = time.perf_counter()
        step(batch)
        queueing.append(time.perf_counter() - started)

    return _seconds(queue, seconds, device), float(np.median(queueing[1:]))


def _seconds(work: Callable[[], Any], at_least_s: float, device: torch.device) -> float:
    """Median seconds of one call, after a first one that is not counted."""
    durations: list[float] = []
    for call in range(1_000):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if call:
            durations.append(time.perf_counter() - started)
        if len(durations) >= FEW_STEPS and sum(durations) >= at_least_s:
            break
    return float(np.median(durations))


def _workers(count: int) -> str:
    return {0: "no workers", 1: "1 worker"}.get(count, f"{count} workers")
