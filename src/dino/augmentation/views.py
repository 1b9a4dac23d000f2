"""What the augmentation hands to training: one batch of views, and the photometric parameters that it still needs.

Shapes: B images in the batch, G global views, L local views, V = G + L, C channels, H x W and h x w view sizes.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Final, Self

import torch
from torch import Tensor

JITTER_OPERATIONS: Final = ("brightness", "contrast", "saturation", "hue")
# `PhotometricParameters.order` points into this list; each entry names the operations in the order they are applied.
JITTER_ORDERS: Final = tuple(itertools.permutations(JITTER_OPERATIONS))
NEUTRAL: Final = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}


@dataclasses.dataclass(frozen=True)
class PhotometricParameters:
    """Parameters of the colour operations, one for each view and sample; neutral where an operation is not applied.

    They always lie on the host: index tensors are made from them there, so that nothing waits for the device.
    """

    order: Tensor  # [V, B] int64, which of JITTER_ORDERS
    brightness: Tensor  # [V, B] float32 factor; 1 is neutral
    contrast: Tensor  # [V, B] float32 factor; 1 is neutral
    saturation: Tensor  # [V, B] float32 factor; 1 is neutral
    hue: Tensor  # [V, B] float32 shift in turns of the colour circle; 0 is neutral
    grayscale: Tensor  # [V, B] bool
    blur_sigma: Tensor  # [V, B] float32, standard deviation in pixels; 0 is neutral
    solarize: Tensor  # [V, B] bool

    def jittered(self) -> Tensor:
        """Bool, of the shape of the parameters: where any jitter operation is not neutral."""
        changed = [getattr(self, name) != neutral for name, neutral in NEUTRAL.items()]
        return torch.stack(changed).any(dim=0)

    def of_views(self, first: int, last: int) -> Self:
        """The same for the views first..last-1."""
        return self._map(lambda values: values[first:last])

    def flat(self) -> Self:
        """View-major: [V, B] -> [V*B]."""
        return self._map(lambda values: values.flatten())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return dataclasses.replace(
            self, **{field.name: function(getattr(self, field.name)) for field in dataclasses.fields(self)}
        )


@dataclasses.dataclass(frozen=True)
class ViewBatch:
    """One micro-batch of views, view-major."""

    global_views: Tensor  # [G, B, C, H, W] uint8 after cropping, and coloured on the host; float32 once normalised
    local_views: Tensor | None  # [L, B, C, h, w] likewise; None when L = 0
    indices: Tensor  # [B] int64 sample indices
    labels: Tensor | None  # [B] int64
    parameters: PhotometricParameters | None  # of the photometric operations; None once these are applied
    bad: tuple[int, ...]  # indices of unreadable images that were replaced by others

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Images, indices and labels on `device`; the photometric parameters stay on the host."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Images, indices and labels in page-locked memory; torch's DataLoader calls this with `pin_memory=True`."""
        return self._map(Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        """All that `to` moves."""
        return [
            tensor for tensor in (self.global_views, self.local_views, self.indices, self.labels) if tensor is not None
        ]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return dataclasses.replace(
            self,
            global_views=function(self.global_views),
            local_views=None if self.local_views is None else function(self.local_views),
            indices=function(self.indices),
            labels=None if self.labels is None else function(self.labels),
        )
