"""Features of whole splits.

Shapes: N images, C channels, D features.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dino import preemption
from dino.evaluation.progress import telling_progress
from dino.ranks import any_rank, gather_rows, world_size


class Batches(Protocol):
    """Pairs of uint8 images [n, C, H, W] and labels [n] (or None), such as `EvaluationLoader` gives."""

    @property
    def num_images(self) -> int:
        """At most so many come."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]: ...


def extract_features(
    model: Callable[[Tensor], Tensor],
    loader: Batches,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    half_precision: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Runs every image of `loader` through `model`, which is in evaluation mode meanwhile.

    Under several ranks all of them call it, each with a loader of its own part, which may be empty; every rank gets the
    rows of all, in the order of the ranks.

    Args:
        model: normalised images [n, C, H, W] -> features [n, D]. A module must be on `device`; its training mode, and
            that of each of its parts, is as before afterwards.
        loader: the images, with or without labels.
        device: where the model runs.
        autocast: makes the context of a forward pass; features are float32 whatever it computes in.
        half_precision: features are L2-normalised and kept in float16.
        mean: of each channel, for pixel values from 0 to 1.
        std: of each channel.

    Returns:
        Features [N, D] in float32 (or float16) and labels [N] (None where the loader has none), both on the CPU, in
        their order.

    Raises:
        ValueError: for loaders without images.
        Preempted: a signal came to this rank or another.
    """
    kept_as = torch.float16 if half_precision else torch.float32
    features, labels = _Rows(loader.num_images, kept_as), _Rows(loader.num_images, torch.int64)
    mode = evaluation_mode(model) if isinstance(model, nn.Module) else contextlib.nullcontext()
    with torch.inference_mode(), mode:
        batches = preemption.until_requested(loader)
        whose = "images" if world_size() == 1 else "images of this rank"
        for images, batch_labels in telling_progress(batches, loader.num_images, whose, lambda batch: len(batch[0])):
            views = normalized(images.to(device, non_blocking=True), mean, std)
            with autocast():
                batch = model(views).float()
            features.append(normalize(batch, dim=1) if half_precision else batch)
            if batch_labels is not None:
                labels.append(batch_labels)
    preemption.check()
    rows = gather_rows(features.all())
    if len(rows) == 0:
        raise ValueError("there are no images to extract features from")
    if not any_rank(labels.count > 0):
        return rows, None
    return rows, gather_rows(labels.all())


class _Rows:
    """A matrix that grows by rows within memory that is asked for once: joining parts would take twice as much."""

    def __init__(self, capacity: int, dtype: torch.dtype) -> None:
        self.capacity, self.dtype, self.count = capacity, dtype, 0
        self._rows: Tensor | None = None

    def append(self, part: Tensor) -> None:
        """Rows [n, ...], kept in the type of the matrix, on the CPU."""
        if self._rows is None:
            # An inference tensor would be refused by autograd, when a probe trains on it.
            with torch.inference_mode(False):
                self._rows = torch.empty(self.capacity, *part.shape[1:], dtype=self.dtype)
        self._rows[self.count : self.count + len(part)] = part
        self.count += len(part)

    def all(self) -> Tensor:
        """[N, ...]; [0] where there are none."""
        return torch.empty(0, dtype=self.dtype) if self._rows is None else self._rows[: self.count]


def normalized(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [N, C, H, W] -> float32: (value / 255 - mean) / std per channel, all that evaluation does to colours."""
    shape = (1, -1, 1, 1)
    mean_tensor = torch.tensor(mean, dtype=torch.float32, device=images.device).view(shape)
    std_tensor = torch.tensor(std, dtype=torch.float32, device=images.device).view(shape)
    return (images.float() / 255 - mean_tensor) / std_tensor


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """`module.eval()` inside; afterwards each part is in the mode that it was in, whatever happened.

    In this mode nothing draws random numbers (drop path, dropout) and batch norm updates no statistics.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
