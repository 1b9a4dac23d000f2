"""Tokens and attention of timm's ViTs: those of our own transformer with the same weights."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dino.backbone import TimmBackbone, VisionTransformer


@pytest.fixture(scope="module")
def pair() -> tuple[TimmBackbone, VisionTransformer]:
    torch.manual_seed(0)
    ours = VisionTransformer(image_size=32, patch_size=16, embed_dim=192, depth=12, num_heads=3).eval()
    timm = TimmBackbone(model_name="vit_tiny_patch16_224", image_size=32).eval()
    timm.network.load_state_dict(ours.state_dict())
    return timm, ours


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_they_are_ours(pair: tuple[TimmBackbone, VisionTransformer], images: Tensor) -> None:
    timm, ours = pair
    assert timm.has_tokens
    assert timm.depth == ours.depth == 12
    with torch.no_grad():
        for theirs, expected in zip(
            timm.intermediate_layers(images, 3), ours.intermediate_layers(images, 3), strict=True
        ):
            assert_close(theirs, expected, rtol=1e-4, atol=1e-5)
        attention = timm.last_attention(images)
        assert_close(attention, ours.last_attention(images), rtol=1e-4, atol=1e-6)
        assert_close(attention.sum(dim=-1), torch.ones_like(attention[..., 0]))


def test_registers_are_left_out(images: Tensor) -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone(model_name="vit_small_patch14_reg4_dinov2", image_size=28).eval()
    pixels = torch.nn.functional.interpolate(images, (28, 28))
    with torch.no_grad():
        assert backbone.intermediate_layers(pixels, 1)[0].shape == (2, 5, 384)
        attention = backbone.last_attention(pixels)
        assert attention.shape == (2, 6, 5, 5)
        assert float(attention.sum(dim=-1).max()) < 1


@pytest.mark.parametrize("name", ["vit_small_patch16_18x2_224", "vit_small_r26_s32_224"])
def test_vits_of_other_blocks_or_patches_have_features_alone(name: str) -> None:
    backbone = TimmBackbone(model_name=name, image_size=64).eval()
    assert not backbone.has_tokens
    assert backbone(torch.zeros(1, 3, 64, 64)).shape == (1, backbone.embed_dim)


def test_the_patch_of_a_vit_is_its_own() -> None:
    with pytest.raises(ValueError, match=r"backbone.patch_size=32: vit_tiny_patch16_224 has patches of 16; set that"):
        TimmBackbone(model_name="vit_tiny_patch16_224", patch_size=32)


def test_others_say_that_they_have_none(images: Tensor) -> None:
    backbone = TimmBackbone(model_name="resnet10t")
    assert not backbone.has_tokens
    with pytest.raises(ValueError, match="TimmBackbone has no patch tokens: use a ViT"):
        backbone.intermediate_layers(images, 1)
    with pytest.raises(ValueError, match="TimmBackbone has no attention: use a ViT"):
        backbone.last_attention(images)
