"""Keeping the prototypes still at the start of training."""

from collections.abc import Iterable

from torch import nn


def cancel_last_layer_gradients(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Drops the gradients of all parameters whose name contains `last_layer` (utils.py, cancel_gradients_last_layer).

    They are set to None rather than zero, so that the optimizer passes over them: no decay, no moments, no step count.
    """
    for name, parameter in named_parameters:
        if "last_layer" in name:
            parameter.grad = None
