"""Which parameters get weight decay."""

from typing import Any

from torch import nn


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups as the original has them (utils.py, get_params_groups): with weight decay, and without.

    Biases and everything one-dimensional (norms) go without; the class token, the position table and the 2-D gain of
    the last layer, where it is trained, are decayed. Parameters without `requires_grad` are in neither. The order is
    that of `named_parameters()`; the schedule of the weight decay moves the first group only.
    """
    regularised: dict[str, Any] = {"params": []}
    not_regularised: dict[str, Any] = {"params": [], "weight_decay": 0.0}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim == 1 or name.endswith(".bias")
        group = not_regularised if plain else regularised
        group["params"].append(parameter)
    return [regularised, not_regularised]
