"""Our vision transformer against figures of the original (tests/reference), and what it promises besides."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dino.backbone import VisionTransformer
from dino.backbone.attention import Sequences, unpacked
from dino.backbone.positions import resize_positions
from dino.backbone.transformer import DropPath


def tiny(**changes: Any) -> VisionTransformer:
    settings: dict[str, Any] = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return VisionTransformer(**settings | changes)


def gradients_of(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.fixture(scope="module")
def parity(reference: Any) -> tuple[VisionTransformer, dict[str, Any]]:
    """The backbone of model.npz, in float64, loaded strictly by the original's names."""
    data = reference("model.npz")
    backbone = VisionTransformer(image_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3).double()
    prefix = "state/backbone."
    state = {name.removeprefix(prefix): torch.from_numpy(v) for name, v in data.items() if name.startswith(prefix)}
    backbone.load_state_dict(state, strict=True)
    assert list(backbone.state_dict()) == list(state), "the order of the parameters is part of the original's layout"
    return backbone, data


@pytest.mark.parametrize("view", ["native", "local", "rect", "double"])
def test_every_output_equals_the_original(parity: tuple[VisionTransformer, dict[str, Any]], view: str) -> None:
    backbone, data = parity
    images = torch.from_numpy(data[f"in/{view}"])
    outputs = {f"cls/{view}": backbone(images), f"attention/{view}": backbone.last_attention(images)}
    for index, layer in enumerate(backbone.intermediate_layers(images, 2)):
        outputs[f"intermediate/{view}/{index}"] = layer
    for name, value in outputs.items():
        np.testing.assert_allclose(value.detach().numpy(), data[name], rtol=1e-9, atol=1e-13, err_msg=name)


def formula(shape: tuple[int, ...], a: float, b: float, s: float = 1.0) -> Tensor:
    """D(shape, a, b, s) = s * sin(a * i + b) over the flat index i, in float64, then float32."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (s * torch.sin(a * index + b)).float().reshape(shape)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (96, 96), (96, 160)])
def test_golden_figures(reference: Any, height: int, width: int) -> None:
    expected = reference("golden.json")[f"vit_{height}x{width}"]
    backbone = VisionTransformer(image_size=224, patch_size=16, embed_dim=32, depth=2, num_heads=2)
    with torch.no_grad():
        for j, (name, parameter) in enumerate(backbone.named_parameters()):
            one = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(formula(tuple(parameter.shape), 0.37, 0.11 * j, 0.05) + one)
        images = formula((2, 3, height, width), 0.013, 0.5)
        features = backbone(images)
        attention = backbone.last_attention(images)
        layers = backbone.intermediate_layers(images, 2)
        positions = resize_positions(backbone.pos_embed, height // 16, width // 16)
    assert features[0, :8].tolist() == pytest.approx(expected["cls_first8"], rel=1e-5)
    assert features.sum().item() == pytest.approx(expected["sum"], rel=1e-4)  # a sum of terms that cancel
    assert attention[0, 0, 0, :4].tolist() == pytest.approx(expected["attn_cls_row_first4"], rel=1e-5)
    assert list(attention.shape) == expected["attn_shape"]
    assert [list(layer.shape) for layer in layers] == expected["inter_shapes"]
    assert [layer.abs().sum().item() for layer in layers] == pytest.approx(expected["inter_sums"], rel=1e-5)
    assert positions[0, 1, :4].tolist() == pytest.approx(expected["pos_first4"], rel=1e-5)
    assert positions.abs().sum().item() == pytest.approx(expected["pos_sum"], rel=1e-5)


def test_initialisation_reaches_every_parameter() -> None:
    backbone = tiny()
    for parameter in backbone.parameters():
        nn.init.constant_(parameter, torch.nan)
    backbone.initialize()
    assert [name for name, parameter in backbone.named_parameters() if parameter.isnan().any()] == []


def test_initialisation_has_the_distribution_of_the_original() -> None:
    torch.manual_seed(0)
    backbone = VisionTransformer(image_size=64, patch_size=8, embed_dim=192, depth=1, num_heads=3)
    for name, parameter in backbone.named_parameters():
        if name.startswith("patch_embed.proj"):
            bound = 1 / math.sqrt(3 * 8 * 8)  # of nn.Conv2d
            assert 0.98 * bound < parameter.abs().max() <= bound, name
        elif "norm" in name or name.endswith("bias"):
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02 if parameter.numel() > 1000 else 0.2), name


def test_attention_rows_are_distributions() -> None:
    attention = tiny().last_attention(torch.randn(3, 3, 16, 8))
    assert attention.shape == (3, 2, 9, 9)
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(3, 2, 9))


def test_the_last_intermediate_layer_starts_with_the_feature() -> None:
    backbone = tiny()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(backbone.intermediate_layers(images, 1)[0][:, 0], backbone(images))
    with pytest.raises(ValueError, match="n=3 last blocks: the backbone has 2"):
        backbone.intermediate_layers(images, 3)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_any_number_of_channels(channels: int) -> None:
    backbone = tiny(channels=channels)
    assert backbone(torch.randn(2, channels, 16, 16)).shape == (2, 16)
    with pytest.raises(ValueError, match=f"images have 2 channels, but backbone.channels={channels}"):
        backbone(torch.randn(2, 2, 16, 16))


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [(95, 96, "instead of 95 use 80 or 96"), (96, 7, "instead of 7 use 16")],
)
def test_a_wrong_size_names_the_nearest_valid_ones(height: int, width: int, message: str) -> None:
    backbone = tiny(image_size=32, patch_size=16)
    assert backbone.valid_size(96)
    assert not backbone.valid_size(95)
    with pytest.raises(ValueError, match=message):
        backbone(torch.randn(1, 3, height, width))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 30}, "backbone.image_size=30: does not divide into patches of 4; use 28 or 32"),
        ({"num_heads": 3}, "backbone.embed_dim=16: must be a multiple of backbone.num_heads=3"),
        ({"depth": 0}, "backbone.depth=0: must be at least 1"),
        ({"channels": 0}, "backbone.channels=0: must be at least 1"),
        ({"drop_path_rate": 1.0}, "backbone.drop_path_rate=1.0: must be at least 0 and below 1"),
        ({"mlp_ratio": 0.0}, "backbone.mlp_ratio=0.0: must be positive"),
        ({"pretrained": True}, "there are no DINO weights of this shape, only vit_small_patch16_224.dino"),
    ],
)
def test_options_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_drop_path_drops_samples_at_its_rate_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        layout = [Sequences(15_000, 3), Sequences(5_000, 3)]
        scales = DropPath(0.3)(layout, torch.ones(60_000, 2, dtype=dtype))
        assert scales is not None
        dropped = scales.float().unflatten(0, (20_000, 3))
        per_sample = dropped[:, 0, 0]
        assert torch.equal(dropped, per_sample[:, None, None].expand_as(dropped)), "one draw per sample"
        assert (per_sample == 0).float().mean().item() == pytest.approx(0.3, abs=0.015)  # 4.6 standard deviations
        assert per_sample.max().item() == pytest.approx(1 / 0.7, rel=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_drop_path_grows_linearly_and_draws_anew_for_each_branch() -> None:
    backbone = tiny(depth=5, drop_path_rate=0.2)
    rates = [block.drop_path.drop_prob for block in backbone.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    block = tiny(depth=2, drop_path_rate=0.5).blocks[1]
    layout = [Sequences(3000, 5), Sequences(500, 10)]
    tokens = torch.randn(20_000, 16)
    torch.manual_seed(1)
    with torch.no_grad():
        output = block.run(tokens, layout)
        attended = block.attn(block.norm1(tokens), layout)
        middles = {False: tokens, True: tokens + 2 * attended}
        seen = torch.zeros(3500, dtype=torch.long)
        for index, (attention_kept, mlp_kept) in enumerate((a, m) for a in (False, True) for m in (False, True)):
            middle = middles[attention_kept]
            expected = middle + 2 * block.mlp(block.norm2(middle)) if mlp_kept else middle
            far = [part.abs().amax(dim=(1, 2)) for part in unpacked(output - expected, layout)]
            seen[torch.cat(far) < 1e-5] = index + 1
    assert seen.min() > 0, "every sample is one of the four combinations"
    shares = torch.bincount(seen, minlength=5)[1:] / 3500
    torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=0.035)


@pytest.mark.slow  # compiles
def test_compiled_it_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(2, 3, 16, 16, generator=generator), torch.randn(4, 3, 8, 8, generator=generator)]
    torch.manual_seed(0)
    backbone = tiny()
    expected = backbone(*views)
    expected.square().sum().backward()
    gradients = gradients_of(backbone)
    backbone.zero_grad()
    backbone.compile_parts()
    found = backbone(*views)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients_of(backbone), gradients, rtol=1e-4, atol=1e-4)


def test_drop_path_is_off_in_evaluation() -> None:
    backbone = tiny(drop_path_rate=0.9).eval()
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(backbone(images), backbone(images))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_fused_attention_of_cuda_equals_the_plain_one() -> None:
    backbone = tiny()
    images = torch.randn(4, 3, 16, 16)
    expected = backbone(images)
    torch.testing.assert_close(backbone.cuda()(images.cuda()).cpu(), expected, rtol=1e-3, atol=1e-4)
