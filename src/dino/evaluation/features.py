"""Features of whole splits.

Shapes: N images, C channels, D features.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dino import preemption
from dino.ranks import any_rank, gather_rows


def extract_features(
    model: Callable[[Tensor], Tensor],
    loader: Iterable[tuple[Tensor, Tensor | None]],
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
        loader: pairs of uint8 images [n, C, H, W] and labels [n] (or None), such as `EvaluationLoader`.
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
    features: list[Tensor] = []
    labels: list[Tensor] = []
    mode = evaluation_mode(model) if isinstance(model, nn.Module) else contextlib.nullcontext()
    with torch.inference_mode(), mode:
        for images, batch_labels in preemption.until_requested(loader):
            views = normalized(images.to(device, non_blocking=True), mean, std)
            with autocast():
                batch = model(views).float()
            features.append((normalize(batch, dim=1).half() if half_precision else batch).cpu())
            if batch_labels is not None:
                labels.append(batch_labels)
    preemption.check()
    # Joined outside of inference mode: a probe that trains on inference tensors would be refused by autograd.
    kept_as = torch.float16 if half_precision else torch.float32
    rows = gather_rows(torch.cat(features) if features else torch.empty(0, dtype=kept_as))
    if len(rows) == 0:
        raise ValueError("there are no images to extract features from")
    if not any_rank(bool(labels)):
        return rows, None
    return rows, gather_rows(torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64))


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
