"""Gradients by groups of layers: against numpy, clipped and not, with a frozen last layer."""

import numpy as np
import pytest
import torch

from dino.backbone import VisionTransformer
from dino.model import DINOHead, MultiCropModel
from dino.monitor.gradients import gradient_distributions, gradient_norms, group_of
from dino.optimizer import cancel_last_layer_gradients, clip_gradients

GROUPS = [
    "backbone.cls_token",
    "backbone.pos_embed",
    "backbone.patch_embed",
    "backbone.blocks.0",
    "backbone.blocks.1",
    "backbone.norm",
    "head.mlp",
    "head.last_layer",
]


@pytest.fixture
def student() -> MultiCropModel:
    torch.manual_seed(0)
    backbone = VisionTransformer(image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, channels=1)
    model = MultiCropModel(backbone, DINOHead(in_dim=16, out_dim=24, hidden_dim=24, bottleneck_dim=8))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    return model


def test_every_group_against_numpy(student: MultiCropModel) -> None:
    names = [name for name, parameter in student.named_parameters() if parameter.grad is not None]
    before = {name: student.get_parameter(name).grad.clone().numpy() for name in names}  # type: ignore[union-attr]
    _, norms = clip_gradients(student.parameters(), 2.0)
    found = gradient_norms(names, norms) | gradient_distributions(student, names)
    assert list(dict.fromkeys(name.split("/")[1] for name in found if name.startswith("grad/"))) == GROUPS
    everything = np.concatenate([student.get_parameter(name).grad.numpy().ravel() for name in names])  # type: ignore[union-attr]
    whole = {kind: found[f"train/grad_{kind}"].item() for kind in ("mean", "std", "min", "max")}
    expected = {"mean": everything.mean(), "std": everything.std(), "min": everything.min(), "max": everything.max()}
    assert whole == pytest.approx(expected, rel=1e-5, abs=1e-7)
    for group in GROUPS:
        own = [name for name in names if group_of(name) == group]
        clipped = np.concatenate([student.get_parameter(name).grad.numpy().ravel() for name in own])  # type: ignore[union-attr]
        expected = {
            "norm": np.sqrt(sum(float((before[name] ** 2).sum()) for name in own)),
            "mean": clipped.mean(),
            "std": clipped.std(),
            "min": clipped.min(),
            "max": clipped.max(),
        }
        actual = {kind: found[f"grad/{group}/{kind}"].item() for kind in expected}
        assert actual == pytest.approx(expected, rel=1e-5, abs=1e-7), group


def test_a_frozen_last_layer_has_a_norm_only(student: MultiCropModel) -> None:
    names = [name for name, parameter in student.named_parameters() if parameter.grad is not None]
    _, norms = clip_gradients(student.parameters(), None)
    cancel_last_layer_gradients(student.named_parameters())
    found = gradient_norms(names, norms) | gradient_distributions(student, names)
    assert [name for name in found if "last_layer" in name] == ["grad/head.last_layer/norm"]
    assert "grad/head.mlp/std" in found


@pytest.mark.parametrize(
    ("parameter", "group"),
    [
        ("backbone.blocks.11.attn.qkv.weight", "backbone.blocks.11"),
        ("backbone.model.layers.2.blocks.5.mlp.fc1.weight", "backbone.model.layers.2"),
        ("backbone.model.layer3.5.conv1.weight", "backbone.model.layer3"),
        ("backbone.model.features.4.0.block.0.0.weight", "backbone.model.features.4"),
        ("head.mlp.2.bias", "head.mlp"),
        ("backbone.cls_token", "backbone.cls_token"),
    ],
)
def test_groups_are_blocks_and_stages(parameter: str, group: str) -> None:
    assert group_of(parameter) == group
