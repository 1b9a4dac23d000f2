"""Sums over the processes of a data-parallel run; in a single process they change nothing."""

import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sums in place over all ranks; every rank must call it."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def max_over_ranks(tensor: Tensor) -> Tensor:
    """Elementwise maximum, in place, over all ranks; every rank must call it."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor
