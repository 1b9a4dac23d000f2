"""Backbones that take the images of one size at a time: what is not our own transformer.

Shapes: N images, C channels, H x W pixels, D features.
"""

import contextlib
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from dino.backbone.base import Backbone


class OneSizeBackbone(Backbone):
    """A pass for each batch. Where anything is recomputed, the backward pass of each makes it again by itself."""

    @abstractmethod
    def features_of(self, images: Tensor) -> Tensor:
        """`[N, C, H, W]` -> `[N, D]`."""

    def forward(self, *batches: Tensor) -> Tensor:
        """Batches `[N_i, C, H_i, W_i]` -> their features, one batch below the other, `[sum N_i, D]`."""
        features = [self._recomputed(images) for images in batches]
        return features[0] if len(features) == 1 else torch.cat(features)

    def _recomputed(self, images: Tensor) -> Tensor:
        if self.recompute == "nothing" or not torch.is_grad_enabled():
            return self.features_of(images)
        features: Tensor = checkpoint(
            self.features_of,
            images,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), _running_statistics_kept(self)),
        )
        return features


@contextlib.contextmanager
def _running_statistics_kept(network: nn.Module) -> Iterator[None]:
    """Batch norms that see a batch for the second time count it once."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # takes nothing in
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)
