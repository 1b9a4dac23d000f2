"""The number format of the loss: at least float32, whatever the networks ran in."""

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself if it is float32 or float64, otherwise a float32 copy."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def no_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which autocast does not lower the arithmetic on this tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False)
