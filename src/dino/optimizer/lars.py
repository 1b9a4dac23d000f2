"""LARS for large batches and convolutional networks."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is as long, relative to each weight, as `trust` says (utils.py, LARS).

    For every parameter that is not one-dimensional:
        update = gradient + weight_decay * parameter
        update = update * trust * |parameter| / |update|      (left alone where either norm is 0)
    and for all of them:
        velocity = momentum * velocity + update;  parameter = parameter - lr * velocity

    You, Gitman & Ginsburg 2017; the original follows Barlow Twins in leaving 1-D parameters without decay and trust.

    Like torch's fused optimizers it leaves everything as it is where `found_inf` is 1.0 (0-d, on the device), so that
    the host need not wait to learn whether the gradients are finite.

    Raises:
        ValueError: for a value out of its range.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"optimizer.momentum={momentum}: use a number from 0 to below 1")
        for name, value in {"lr": lr, "weight_decay": weight_decay, "trust": trust}.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"optimizer.{name}={value}: use a number of 0 or more")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; `closure` as for any optimizer of torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        updates = [parameter.grad for parameter in parameters if parameter.grad is not None]
        adapted = [index for index, parameter in enumerate(parameters) if parameter.ndim != 1]
        if adapted:
            weights = [parameters[index] for index in adapted]
            gradients = [updates[index] for index in adapted]
            for index, update in zip(adapted, _trusted(weights, gradients, group), strict=True):
                updates[index] = update
        velocities = [self._velocity(parameter) for parameter in parameters]
        moved = torch._foreach_mul(velocities, group["momentum"])
        torch._foreach_add_(moved, updates)
        steps = moved
        if self.found_inf is not None:
            skipped = self.found_inf.bool()
            moved = tuple(torch.where(skipped, old, new) for old, new in zip(velocities, moved, strict=True))
            steps = tuple(step.masked_fill(skipped, 0.0) for step in moved)
        torch._foreach_copy_(velocities, moved)
        torch._foreach_add_(parameters, steps, alpha=-group["lr"])

    def _velocity(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(parameter)
        velocity: Tensor = state["velocity"]
        return velocity


def _trusted(weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """The gradients with decay, rescaled to `trust` times the norm of their weights; nothing is read on the host."""
    updates = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
    weight_norms = torch.stack(torch._foreach_norm(weights))
    update_norms = torch.stack(torch._foreach_norm(updates))
    usable = (weight_norms > 0) & (update_norms > 0)
    factors = torch.where(usable, group["trust"] * weight_norms / update_norms, 1.0)
    torch._foreach_mul_(updates, list(factors.unbind()))
    return updates
