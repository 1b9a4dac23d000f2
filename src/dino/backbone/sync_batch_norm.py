"""Batch norm over the batch of all ranks.

Shapes: N images of this rank, C channels, any further dimensions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino.ranks import is_distributed, sum_over_ranks


def convert_sync_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """`module`, changed in place: each of its batch norms now normalises over the images of all ranks.

    Parameters, buffers and their names stay what they are. nn.SyncBatchNorm.convert_sync_batchnorm is not used, because
    it drops what a norm carries along: timm's BatchNormAct2d holds the dropout and the activation that follow it.

    Args:
        module: may be anywhere still.
        device: where it will run.
    """
    kind = _OnGPU if device.type == "cuda" else _OnCPU
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.__class__ = kind
    return module


class _OnGPU(nn.SyncBatchNorm):
    """torch's own; modules inside of the norm follow it in their order."""

    process_group = None  # all ranks; a converted norm has none of its own

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, ...] to the same shape and type."""
        return _followed(self, super().forward(input))


class _OnCPU(_BatchNorm):
    """The same where torch has none; a single process, or evaluation, is plain batch norm."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, ...] to the same shape and type."""
        together = self.training and is_distributed()
        return _followed(self, self._over_ranks(input) if together else super().forward(input))

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions goes."""

    def _over_ranks(self, input: Tensor) -> Tensor:
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        others = [dimension for dimension in range(values.ndim) if dimension != 1]
        shape = [1, -1] + [1] * (values.ndim - 2)
        own_count = values.new_tensor([values.numel() / values.shape[1]])
        sums = _sum(torch.cat([values.sum(others), own_count]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centered = values - mean.view(shape)
        variance = _sum(centered.square().sum(others)) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        output = centered * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.mul_(1 - share).add_(mean, alpha=share)
        self.running_var.mul_(1 - share).add_(unbiased_variance, alpha=share)


def _followed(norm: nn.Module, output: Tensor) -> Tensor:
    for following in norm.children():
        output = following(output)
    return output


class _SumOverRanks(torch.autograd.Function):
    """Every rank's loss depends on every rank's summand, so gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, summand: Tensor) -> Tensor:
        return sum_over_ranks(summand.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient.clone())


def _sum(summand: Tensor) -> Tensor:
    total: Tensor = _SumOverRanks.apply(summand)
    return total
