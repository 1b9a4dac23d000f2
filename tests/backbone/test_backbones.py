"""Every option of the group `backbone`: built from its YAML, forward and backward at two sizes."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import dino.backbone
from dino.backbone import Backbone, ConvolutionalBackbone, TimmBackbone

CONFIGS = Path(__file__).resolve().parents[2] / "conf" / "backbone"
COUNTS = {  # of the original for ViTs, of torchvision less its classifier for the rest
    "vit_t16": 5_524_416,
    "vit_s16": 21_665_664,
    "vit_s8": 21_670_272,
    "vit_b16": 85_798_656,
    "vit_b8": 85_807_872,
    "resnet18": 11_176_512,
    "resnet34": 21_284_672,
    "resnet50": 23_508_032,
    "resnet101": 42_500_160,
    "resnet152": 58_143_808,
    "efficientnet_b0": 4_007_548,
}
HEAVY = ("vit_b16", "vit_b8", "resnet101", "resnet152")


def marked(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow) if name in HEAVY else name


def build(name: str, image_size: int, channels: int = 3, **changes: Any) -> Backbone:
    """The backbone of conf/backbone/NAME.yaml, with what other groups give it."""
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    target = getattr(dino.backbone, settings.pop("_target_").rpartition(".")[2])
    given = {"image_size": image_size, "channels": channels}
    backbone: Backbone = target(**settings | {key: value for key, value in given.items() if key in settings} | changes)
    return backbone


def check_forward_and_backward(backbone: Backbone, sizes: tuple[int, int], channels: int = 3) -> None:
    for size in sizes:
        backbone.zero_grad()
        features = backbone(torch.randn(2, channels, size, size))
        assert features.shape == (2, backbone.embed_dim)
        features.square().sum().backward()
        without = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
        assert without == []
        assert all(parameter.grad.isfinite().all() for parameter in backbone.parameters())


def test_all_options_are_covered() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*COUNTS, "vit_micro4", "vit_t4", "timm"}


@pytest.mark.parametrize("name", [marked(name) for name in [*COUNTS, "vit_micro4", "vit_t4"]])
def test_two_sizes_forward_and_backward(name: str) -> None:
    # As few pixels as two sizes allow.
    patch = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()).get("patch_size", 32)
    check_forward_and_backward(build(name, 2 * patch), (patch, 2 * patch))


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        backbone = build(name, 224)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == COUNTS[name]


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "vit_micro4"])
@pytest.mark.parametrize("channels", [1, 5])
def test_other_numbers_of_channels(name: str, channels: int) -> None:
    check_forward_and_backward(build(name, 32, channels), (32, 40), channels)


def test_the_small_stem_keeps_the_resolution() -> None:
    small, imagenet = build("resnet18", 32, stem="small"), build("resnet18", 32)
    images = torch.randn(2, 3, 32, 32)
    maps = [torch.nn.Sequential(*list(backbone.children())[:4])(images) for backbone in (small, imagenet)]
    assert [tuple(features.shape[-2:]) for features in maps] == [(32, 32), (8, 8)]
    check_forward_and_backward(build("resnet18", 32, 1, stem="small"), (16, 32), 1)


def test_a_resnet_equals_torchvision() -> None:
    """Same names, same order, and the average of the last map as the feature."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    theirs = resnet18().eval()
    ours = build("resnet18", 32).eval()
    theirs.fc = torch.nn.Identity()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = torch.randn(2, 3, 40, 48)
    torch.testing.assert_close(ours(images), theirs(images))


def test_a_replaced_first_convolution_starts_as_torchvisions() -> None:
    torch.manual_seed(0)
    for changes in ({"channels": 5}, {"stem": "small"}):
        weight = build("resnet18", 32, **changes).conv1.weight
        fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
        assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "resnet51"}, "backbone.architecture=resnet51: use resnet18, "),
        ({"stem": "tiny"}, "backbone.stem=tiny: use imagenet or small"),
        ({"channels": 0}, "backbone.channels=0: must be at least 1"),
        ({"drop_path_rate": 0.1}, "backbone.drop_path_rate=0.1: resnet18 has no drop path; use 0"),
        ({"architecture": "efficientnet_b0", "stem": "small"}, "backbone.stem=small is for ResNets"),
        ({"architecture": "efficientnet_b0", "drop_path_rate": 1.0}, "must be at least 0 and below 1"),
        ({"stem": "small", "pretrained": True}, "backbone.pretrained=true needs backbone.stem=imagenet"),
    ],
)
def test_convolutional_options_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvolutionalBackbone(**{"architecture": "resnet18"} | changes)


@pytest.mark.parametrize(
    ("model_name", "patch_size", "sizes"),
    [
        ("test_vit", 16, (32, 64)),  # class token
        ("test_resnet", 1, (32, 40)),
        ("test_convnext", 1, (32, 64)),
        ("mobilenetv3_small_050", 1, (32, 48)),  # a layer after the pooling: features wider than the last map
    ],
)
def test_timm_networks_of_every_kind(model_name: str, patch_size: int, sizes: tuple[int, int]) -> None:
    for channels in (1, 3):
        backbone = build("timm", sizes[1], channels, model_name=model_name)
        assert backbone.patch_size == patch_size
        check_forward_and_backward(backbone, sizes, channels)


def test_a_timm_network_that_takes_none_of_the_options() -> None:
    """This one refuses drop path and image sizes, all in one message."""
    with torch.device("meta"):
        assert build("timm", 64, model_name="hrnet_w18_small").embed_dim == 2048


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_name": "vit_smal_patch16_224"},
            "model_name=vit_smal_patch16_224: .* close names: .*vit_small_patch16",
        ),
        ({"model_name": "hf-hub:someone/something"}, "timm has no such network"),
        ({"model_name": "vit_small_patch16_224.dyno"}, "has no weights called dyno; it has .*dino"),
        ({"model_name": "test_vit", "drop_path_rate": -0.1}, "backbone.drop_path_rate=-0.1"),
        ({"model_name": "vgg11", "drop_path_rate": 0.1}, "backbone.drop_path_rate=0.1: vgg11 has no drop path"),
        ({"model_name": "test_vit", "image_size": 40}, "backbone.image_size=40: .* patches of 16; use 32 or 48"),
        ({"model_name": "test_vit", "patch_size": 8}, "backbone.patch_size=8: test_vit has patches of 16; set that"),
        ({"model_name": "resnet10t", "pretrained": True, "weights": "a.pt"}, "exclude each other"),
    ],
)
def test_timm_options_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimmBackbone(**{"image_size": 32} | changes)


def test_a_timm_network_of_a_fixed_size_says_so() -> None:
    backbone = TimmBackbone(model_name="pit_ti_distilled_224", image_size=224)
    with pytest.raises(ValueError, match="pit_ti_distilled_224 takes only images of 224 x 224 pixels, not 112 x 112"):
        backbone(torch.randn(1, 3, 112, 112))


def test_the_default_backbone_needs_neither_torchvision_nor_timm() -> None:
    """Both take longer to import than a short run; fresh process, since other tests have imported them."""
    code = (
        "import sys, dino.backbone, dino.model\n"
        "dino.backbone.VisionTransformer(image_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2)\n"
        "print([name for name in ('torchvision', 'timm') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
