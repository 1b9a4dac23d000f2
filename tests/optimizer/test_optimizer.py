"""Parameter groups, clipping, freezing and LARS, each against the plain loop that it stands for."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dino.backbone import VisionTransformer
from dino.model import DINOHead, MultiCropModel
from dino.optimizer import (
    LARS,
    ClipMode,
    cancel_last_layer_gradients,
    clip_gradients,
    parameter_groups,
)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5)).double()


def with_gradients(scale: float = 1.0) -> list[nn.Parameter]:
    parameters = list(small_network().parameters())
    generator = torch.Generator().manual_seed(1)
    for index, parameter in enumerate(parameters):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = noise * scale * 10.0 ** (index - 3)
    return parameters


# ---------------------------------------------------------------------- groups and freezing


def test_groups_of_vit_s_and_its_head_are_the_originals() -> None:
    backbone = VisionTransformer(image_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6)
    student = MultiCropModel(backbone, DINOHead(in_dim=384, out_dim=64))
    regularised, plain = parameter_groups(student)
    assert (len(regularised["params"]), len(plain["params"])) == (55, 102)
    assert "weight_decay" not in regularised
    assert plain["weight_decay"] == 0
    decayed = {id(parameter) for parameter in regularised["params"]}
    assert {id(backbone.cls_token), id(backbone.pos_embed), id(student.head.last_layer.weight_v)} <= decayed
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    assert all(parameter.ndim == 1 or names[id(parameter)].endswith(".bias") for parameter in plain["params"])
    order = list(names)
    for group in (regularised, plain):
        places = [order.index(id(parameter)) for parameter in group["params"]]
        assert places == sorted(places)


def test_parameters_that_are_not_trained_are_in_no_group() -> None:
    network = small_network()
    network[0].requires_grad_(False)
    grouped = [parameter for group in parameter_groups(network) for parameter in group["params"]]
    assert len(grouped) == 4
    assert all(parameter.requires_grad for parameter in grouped)


def test_only_the_last_layer_loses_its_gradients() -> None:
    head = DINOHead(in_dim=4, out_dim=6, hidden_dim=5, bottleneck_dim=3, norm_last_layer=False)
    head(torch.randn(2, 4)).logits().square().sum().backward()
    cancel_last_layer_gradients(head.named_parameters())
    without = {name for name, parameter in head.named_parameters() if parameter.grad is None}
    assert without == {"last_layer.weight_g", "last_layer.weight_v"}


# ---------------------------------------------------------------------- clipping


def plainly_clipped(parameters: list[nn.Parameter], max_norm: float, mode: str) -> list[Tensor]:
    gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    total = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    clipped = []
    for gradient in gradients:
        coefficient = max_norm / ((gradient.norm().item() if mode == "per_tensor" else total) + 1e-6)
        clipped.append(gradient * coefficient if coefficient < 1 else gradient)
    return clipped


@pytest.mark.parametrize("mode", ["per_tensor", "global_norm"])
@pytest.mark.parametrize("max_norm", [0.05, 3.0, 1e6])
def test_clipping_equals_a_plain_loop(mode: ClipMode, max_norm: float) -> None:
    parameters = with_gradients()
    parameters[2].grad = None
    expected = plainly_clipped(parameters, max_norm, mode)
    before = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm()
    total, each = clip_gradients(parameters, max_norm, mode)
    torch.testing.assert_close(total, before)
    torch.testing.assert_close(each.norm(), before)
    actual = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    assert parameters[2].grad is None


def test_small_gradients_are_not_touched() -> None:
    parameters = with_gradients(scale=1e-6)
    before = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    clip_gradients(parameters, 1.0)
    assert all(torch.equal(p.grad, b) for p, b in zip(parameters, before, strict=True) if p.grad is not None)


@pytest.mark.parametrize("off", [0, None])
def test_clipping_can_be_off_and_still_measures(off: float | None) -> None:
    parameters = with_gradients(scale=100.0)
    before = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    assert clip_gradients(parameters, off)[0] > 100
    assert all(torch.equal(p.grad, b) for p, b in zip(parameters, before, strict=True) if p.grad is not None)


def test_clipping_without_gradients_and_with_wrong_settings() -> None:
    assert clip_gradients(small_network().parameters(), 3.0)[0] == 0
    with pytest.raises(ValueError, match=r"trainer\.clip_norm=-1"):
        clip_gradients(with_gradients(), -1)
    with pytest.raises(ValueError, match=r"trainer\.clip_mode=each: use per_tensor or global_norm"):
        clip_gradients(with_gradients(), 1.0, "each")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- LARS


def plain_lars_step(
    parameters: list[Tensor], velocities: list[Tensor], *, lr: float, momentum: float, trust: float, decay: float
) -> None:
    """The formula of the docstring, one parameter at a time."""
    for parameter, velocity in zip(parameters, velocities, strict=True):
        assert parameter.grad is not None
        update = parameter.grad.clone()
        if parameter.ndim != 1:
            update += decay * parameter.detach()
            weight_norm, update_norm = parameter.detach().norm().item(), update.norm().item()
            if weight_norm > 0 and update_norm > 0:
                update *= trust * weight_norm / update_norm
        velocity.mul_(momentum).add_(update)
        parameter.data -= lr * velocity


def test_lars_equals_a_plain_loop() -> None:
    network = small_network()
    with torch.no_grad():
        network[3].weight.zero_()  # a norm of zero: no trust ratio in the first step
    plain = copy.deepcopy(network)
    optimizer = LARS(parameter_groups(network), lr=0.3, weight_decay=1e-2)
    velocities = [torch.zeros_like(parameter) for parameter in plain.parameters()]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for one, other in zip(network.parameters(), plain.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator, dtype=torch.float64)
            other.grad = one.grad.clone()
        optimizer.step()
        plain_lars_step(list(plain.parameters()), velocities, lr=0.3, momentum=0.9, trust=0.001, decay=1e-2)
    for (name, actual), expected in zip(network.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15, msg=name)


def test_lars_passes_over_parameters_without_gradient_and_resumes() -> None:
    def run(steps: range, network: nn.Module, optimizer: LARS) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for parameter in network.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            network[3].weight.grad = None
            optimizer.step()

    straight = small_network()
    frozen = straight[3].weight.detach().clone()
    optimizer = LARS(parameter_groups(straight), lr=0.3)
    run(range(4), straight, optimizer)
    assert torch.equal(straight[3].weight, frozen)

    first, second = small_network(), small_network()
    before = LARS(parameter_groups(first), lr=0.3)
    run(range(2), first, before)
    after = LARS(parameter_groups(second), lr=0.3)
    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    run(range(2, 4), second, after)
    for one, other in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"momentum": 1.0}, {"weight_decay": -0.1}, {"trust": -1.0}])
def test_lars_refuses_wrong_values_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"optimizer\.{next(iter(wrong))}="):
        LARS(small_network().parameters(), **{"lr": 0.1, **wrong})
