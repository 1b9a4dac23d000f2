"""The projection head against the original's figures and against `torch.nn.utils.weight_norm`."""

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dino.model import DINOHead, WeightNormLinear


def test_logits_equal_the_original(reference: Any) -> None:
    data = reference("model.npz")
    head = DINOHead(in_dim=24, out_dim=48, hidden_dim=40, bottleneck_dim=16).double()
    prefix = "state/head."
    state = {name.removeprefix(prefix): torch.from_numpy(v) for name, v in data.items() if name.startswith(prefix)}
    head.load_state_dict(state, strict=True)
    assert list(head.state_dict()) == list(state)
    for view in ("native", "local", "rect", "double"):
        logits = head(torch.from_numpy(data[f"cls/{view}"])).logits().detach().numpy()
        np.testing.assert_allclose(logits, data[f"head/{view}"], rtol=1e-9, atol=1e-13, err_msg=view)


def test_prototypes_equal_the_weight_norm_of_torch_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    ours = WeightNormLinear(6, 9, learn_gain=True).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = nn.utils.weight_norm(nn.Linear(6, 9, bias=False)).double()
    nn.init.uniform_(ours.weight_g, 0.5, 2.0)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    rows, target = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    for logits in (ours(rows).logits(), theirs(rows)):
        (logits * target).sum().backward()
    torch.testing.assert_close(ours(rows).logits(), theirs(rows), rtol=1e-12, atol=0)
    for name in ("weight_g", "weight_v"):
        gradient, expected = (getattr(layer, name).grad for layer in (ours, theirs))
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-14)


def test_a_copy_of_the_head_is_independent() -> None:
    head = DINOHead(in_dim=4, out_dim=6, hidden_dim=5, bottleneck_dim=3)
    features = torch.randn(2, 4)
    copied = copy.deepcopy(head)
    before = head(features).logits()
    before.sum().backward()
    with torch.no_grad():
        copied.last_layer.weight_v.neg_()
    assert torch.equal(head(features).logits(), before)
    torch.testing.assert_close(copied(features).logits(), -before)


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_parameter_counts_of_the_original(norm_last_layer: bool) -> None:
    with torch.device("meta"):
        head = DINOHead(in_dim=384, norm_last_layer=norm_last_layer)
    trainable = sum(parameter.numel() for parameter in head.parameters() if parameter.requires_grad)
    assert sum(parameter.numel() for parameter in head.parameters()) == 22_352_128
    assert trainable == (22_286_592 if norm_last_layer else 22_352_128)


def test_initialisation_reaches_every_parameter() -> None:
    head = DINOHead(in_dim=4, out_dim=6, hidden_dim=5, bottleneck_dim=3, batch_norm=True)
    for tensor in [*head.parameters(), *head.buffers()]:
        if tensor.is_floating_point():
            nn.init.constant_(tensor, torch.nan)
    head.initialize()
    assert [name for name, value in head.state_dict().items() if value.isnan().any()] == []


def test_initialisation_has_the_distribution_of_the_original() -> None:
    torch.manual_seed(0)
    head = DINOHead(in_dim=64, out_dim=512, hidden_dim=256, bottleneck_dim=256)
    assert [name for name, _ in head.named_parameters()] == [
        *(f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")),
        "last_layer.weight_g",
        "last_layer.weight_v",
    ]
    for i in (0, 2, 4):
        assert head.mlp[i].weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert not head.mlp[i].bias.any()
    assert torch.equal(head.last_layer.weight_g, torch.ones(512, 1))
    assert 0.0624 < head.last_layer.weight_v.abs().max() <= 0.0625
    assert head.last_layer.weight_v.std().item() == pytest.approx(0.0361, rel=0.01)


def test_logits_are_cosines_while_the_gain_is_one() -> None:
    head = DINOHead(in_dim=8, out_dim=50, hidden_dim=16, bottleneck_dim=4)
    nn.init.normal_(head.last_layer.weight_v, std=3.0)
    logits = head(torch.randn(40, 8) * 100).logits()
    assert 0.9 < logits.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"num_layers": 1}, ["mlp.weight", "mlp.bias"]),
        ({"num_layers": 2}, ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"]),
        (
            {"num_layers": 2, "batch_norm": True},
            [*(f"mlp.{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias"))],
        ),
    ],
)
def test_names_of_other_heads_are_those_of_the_original(settings: dict[str, Any], names: list[str]) -> None:
    head = DINOHead(in_dim=4, out_dim=6, hidden_dim=5, bottleneck_dim=3, **settings)
    assert [name for name, _ in head.mlp.named_parameters(prefix="mlp")] == names
    assert head(torch.randn(3, 4)).logits().shape == (3, 6)


def test_batch_norm_normalises_before_the_activation() -> None:
    head = DINOHead(in_dim=4, out_dim=6, hidden_dim=5, bottleneck_dim=3, batch_norm=True).train()
    shifted = torch.randn(64, 4) * 5 + 30
    hidden = head.mlp[1](head.mlp[0](shifted))
    torch.testing.assert_close(hidden.mean(dim=0), torch.zeros(5), rtol=0, atol=1e-4)
    assert isinstance(head.mlp[2], nn.GELU)


def test_half_precision_keeps_the_lengths() -> None:
    """Under autocast the normalisation and its result stay in float32."""
    head = DINOHead(in_dim=8, out_dim=6, hidden_dim=16, bottleneck_dim=4)
    lengths: list[torch.Tensor] = []
    head.last_layer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].norm(dim=-1)))
    with torch.autocast("cpu", torch.bfloat16):
        head(torch.randn(10, 8))
    torch.testing.assert_close(lengths[0], torch.ones(10), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["in_dim", "out_dim", "hidden_dim", "bottleneck_dim", "num_layers"])
def test_options_out_of_range(name: str) -> None:
    with pytest.raises(ValueError, match=rf"head\.{name}=0: must be at least"):
        DINOHead(**{"in_dim": 4, "out_dim": 6, name: 0})
