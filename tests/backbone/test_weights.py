"""Weights of every layout: all tensors or an error that names what does not fit, and never a download."""

import argparse
import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dino.backbone import (
    ConvolutionalBackbone,
    TimmBackbone,
    VisionTransformer,
    from_original_names,
    load_weights,
    original_names,
)
from dino.backbone.weights import adapt_channels
from dino.model import DINOHead, MultiCropModel, StudentTeacher

State = dict[str, Tensor]


def tiny(**changes: Any) -> VisionTransformer:
    settings: dict[str, Any] = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return VisionTransformer(**settings | changes)


def randomize(module: torch.nn.Module) -> None:
    """Every tensor, also those that start as zeros and ones, gets a value of its own."""
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            # Vectors also scale and are variances, so they stay positive.
            tensor.copy_(torch.rand_like(tensor) + 0.5 if tensor.ndim == 1 else torch.randn_like(tensor) * 0.2)


@pytest.fixture
def model() -> StudentTeacher:
    """Student and teacher with different weights."""
    torch.manual_seed(0)
    model = StudentTeacher(MultiCropModel(tiny(), DINOHead(in_dim=16, out_dim=12, hidden_dim=16, bottleneck_dim=8)))
    randomize(model)
    return model


def assert_same(first: torch.nn.Module, second: torch.nn.Module) -> None:
    """The same features, in float64."""
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    first, second = (copy.deepcopy(module).double() for module in (first, second))
    with torch.no_grad():
        torch.testing.assert_close(first(images), second(images), rtol=1e-9, atol=1e-11)


def ours(model: StudentTeacher) -> object:
    return {"model": model.state_dict(), "optimizer": {"state": {}}, "step": 7}


def original(model: StudentTeacher) -> object:
    """As main_dino.py saves it, with its parsed arguments, which plain `weights_only` loading refuses."""
    return {**original_names(model.state_dict()), "epoch": 3, "args": argparse.Namespace(arch="vit_small", lr=5e-4)}


@pytest.mark.parametrize("layout", [ours, original])
@pytest.mark.parametrize("network", ["teacher", "student"])
def test_checkpoints_with_both_networks(
    model: StudentTeacher, tmp_path: Path, layout: Callable[[StudentTeacher], object], network: str
) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(layout(model), path)
    backbone = tiny()
    report = load_weights(backbone, path, network)
    assert (report.loaded, report.total, len(report.ignored)) == (30, 30, 8)
    assert str(report).startswith(f"loaded 30 of 30 tensors from backbone.weights={path}")
    assert network in report.layout
    assert_same(backbone, getattr(model, network).backbone)


def test_by_default_the_teacher_is_loaded(model: StudentTeacher, tmp_path: Path) -> None:
    torch.save(ours(model), tmp_path / "ours.pt")
    assert_same(tiny(weights=str(tmp_path / "ours.pt")), model.teacher.backbone)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("wrap", ["bare", "backbone.", "module.backbone.", "module.", "_orig_mod."])
def test_one_network_alone(model: StudentTeacher, tmp_path: Path, suffix: str, wrap: str) -> None:
    source = model.teacher.backbone
    state = {("" if wrap == "bare" else wrap) + name: value for name, value in source.state_dict().items()}
    path = tmp_path / f"backbone.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    backbone = tiny()
    assert load_weights(backbone, path).loaded == 30
    assert_same(backbone, source)


def test_the_whole_model_of_one_network(model: StudentTeacher, tmp_path: Path) -> None:
    torch.save({"state_dict": model.student.state_dict()}, tmp_path / "model.pt")
    backbone = tiny()
    assert load_weights(backbone, tmp_path / "model.pt").ignored[0] == "head.mlp.0.weight"
    assert_same(backbone, model.student.backbone)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_vit_of_timm_gives_the_same_features(tmp_path: Path, wrapped: bool) -> None:
    """Loaded from timm's own state (with classifier), compared with timm's own forward pass; and the way back."""
    from timm import create_model

    torch.manual_seed(0)
    theirs = create_model("vit_tiny_patch16_224", pretrained=False, num_classes=7, img_size=32, depth=3).eval()
    randomize(theirs)
    state = theirs.state_dict()
    torch.save({"state_dict": state, "epoch": 1} if wrapped else state, tmp_path / "timm.pth")
    backbone = tiny(patch_size=16, embed_dim=192, depth=3, num_heads=3)
    report = load_weights(backbone, tmp_path / "timm.pth")
    assert (report.loaded, report.total, report.ignored) == (42, 42, ("head.weight", "head.bias"))
    theirs.reset_classifier(0)
    assert_same(backbone, theirs)


def test_between_our_vit_and_timms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = tiny(patch_size=16, embed_dim=192, depth=12, num_heads=3)
    randomize(ours)
    torch.save(ours.state_dict(), tmp_path / "ours.pt")
    timm = TimmBackbone(model_name="vit_tiny_patch16_224", image_size=32, weights=str(tmp_path / "ours.pt")).eval()
    assert_same(timm, ours)
    # A checkpoint of `backbone=timm` has the names of the wrapper; it loads into both.
    torch.save({f"teacher.backbone.{name}": value for name, value in timm.state_dict().items()}, tmp_path / "timm.pt")
    for backbone in (tiny(patch_size=16, embed_dim=192, depth=12, num_heads=3), timm):
        randomize(backbone)
        load_weights(backbone, tmp_path / "timm.pt")
        assert_same(backbone, ours)


def hugging_face_names(state: State, prefix: str = "") -> State:
    """Our state by the names of ViTModel, written out by hand from its documentation, with a pooler."""
    top = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    result = {theirs: state[our] for our, theirs in top.items()}
    for i in range(2):
        for kind in ("weight", "bias"):
            layer = f"encoder.layer.{i}"
            query, key, value = state[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            result[f"{layer}.attention.attention.query.{kind}"] = query.clone()
            result[f"{layer}.attention.attention.key.{kind}"] = key.clone()
            result[f"{layer}.attention.attention.value.{kind}"] = value.clone()
            result[f"{layer}.attention.output.dense.{kind}"] = state[f"blocks.{i}.attn.proj.{kind}"]
            result[f"{layer}.intermediate.dense.{kind}"] = state[f"blocks.{i}.mlp.fc1.{kind}"]
            result[f"{layer}.output.dense.{kind}"] = state[f"blocks.{i}.mlp.fc2.{kind}"]
            result[f"{layer}.layernorm_before.{kind}"] = state[f"blocks.{i}.norm1.{kind}"]
            result[f"{layer}.layernorm_after.{kind}"] = state[f"blocks.{i}.norm2.{kind}"]
    result["pooler.dense.weight"], result["pooler.dense.bias"] = torch.randn(16, 16), torch.randn(16)
    return {prefix + name: value for name, value in result.items()}


@pytest.mark.parametrize("prefix", ["", "vit."])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_hugging_face(model: StudentTeacher, tmp_path: Path, prefix: str, file: str) -> None:
    state = hugging_face_names(model.teacher.backbone.state_dict(), prefix)
    if file.endswith("bin"):
        torch.save(state, tmp_path / file)
    else:
        save_file(state, tmp_path / file)
    for place in (tmp_path / file, tmp_path):  # the file, or the folder as it is downloaded
        backbone = tiny()
        report = load_weights(backbone, place)
        assert (report.loaded, report.layout) == (30, "Hugging Face ViTModel")
        assert set(report.ignored) == {"pooler.dense.weight", "pooler.dense.bias"}
        assert_same(backbone, model.teacher.backbone)


def test_a_hugging_face_file_without_a_key_names_it(model: StudentTeacher, tmp_path: Path) -> None:
    state = hugging_face_names(model.teacher.backbone.state_dict())
    del state["encoder.layer.1.attention.attention.key.bias"]
    torch.save(state, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"29 of 30 .* missing: blocks.1.attn.qkv.bias; unexpected: encoder.layer.1"):
        load_weights(tiny(), tmp_path / "a.bin")


@pytest.mark.parametrize("library", ["torchvision", "timm", "original"])
def test_resnets(tmp_path: Path, library: str) -> None:
    import timm
    import torchvision

    torch.manual_seed(0)
    theirs = timm.create_model("resnet18") if library == "timm" else torchvision.models.resnet18()
    randomize(theirs)
    state = theirs.state_dict()
    if library == "original":  # with batch norm the original's teacher is wrapped too
        state = {"teacher": {f"module.backbone.{n}": v for n, v in state.items() if not n.startswith("fc.")}}
    torch.save(state, tmp_path / "resnet.pth")
    backbone = ConvolutionalBackbone(architecture="resnet18").eval()
    report = load_weights(backbone, tmp_path / "resnet.pth")
    assert (report.loaded, report.total) == (120, 120)
    theirs.fc = torch.nn.Identity()
    assert_same(backbone, theirs.eval())


def test_an_old_resnet_without_counters(tmp_path: Path) -> None:
    backbone = ConvolutionalBackbone(architecture="resnet18")
    state = {n: v for n, v in backbone.state_dict().items() if not n.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    assert load_weights(backbone, tmp_path / "old.pth").loaded == 120


@pytest.mark.parametrize("damage", ["rename", "remove", "add", "reshape"])
def test_what_does_not_fit_is_named_and_changes_nothing(model: StudentTeacher, tmp_path: Path, damage: str) -> None:
    state = dict(model.teacher.backbone.state_dict())
    name = "blocks.1.mlp.fc1.weight"
    if damage == "rename":
        state["blocks.1.mlp.fcl.weight"] = state.pop(name)
        message = rf"only 29 of 30 tensors fit .* missing: {name}; unexpected: blocks.1.mlp.fcl.weight"
    elif damage == "remove":
        del state[name]
        message = rf"only 29 of 30 tensors fit .* missing: {name}$"
    elif damage == "add":
        state["blocks.1.ls1.gamma"] = torch.ones(16)
        message = r"all 30 tensors fit, but it has 1 more, .* unexpected: blocks.1.ls1.gamma$"
    else:
        state[name] = torch.zeros(63, 16)
        message = rf"of another shape: {name} \[63, 16\] instead of \[64, 16\]"
    torch.save(state, tmp_path / "damaged.pt")
    backbone = tiny()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(ValueError, match=message) as raised:
        load_weights(backbone, tmp_path / "damaged.pt")
    assert f"backbone.weights={tmp_path / 'damaged.pt'}" in str(raised.value)
    torch.testing.assert_close(dict(backbone.state_dict()), before, rtol=0, atol=0)


def test_many_names_are_counted_not_listed(tmp_path: Path) -> None:
    torch.save(tiny(depth=1).state_dict(), tmp_path / "shallow.pt")
    with pytest.raises(ValueError, match=r"only 18 of 30 tensors fit .* and 8 more$"):
        load_weights(tiny(), tmp_path / "shallow.pt")


@pytest.mark.parametrize(
    ("content", "network", "message"),
    [
        (None, "teacher", "there is no such file"),
        (b"not weights at all", "teacher", "damaged|not a readable weight file"),
        ({"student": {"module.backbone.cls_token": torch.ones(1)}}, "teacher", "there is no teacher in it"),
        ({"model": {"teacher.backbone.cls_token": torch.ones(1)}}, "student", "there is no student in it"),
        ({"step": 3, "lr": 0.1}, "teacher", "it holds no tensors by name, only what is called step, lr"),
        ({}, "teacher", "it holds no tensors by name$"),
        ([torch.ones(1)], "teacher", "it holds a list, not parameters by name"),
        ({"cls_token": torch.ones(1)}, "average", "network=average: use student or teacher"),
        ({"a": Path("x")}, "teacher", "holds more than tensors and plain values"),
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, content: object, network: str, message: str) -> None:
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as raised:
        load_weights(tiny(), path, network)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("place", ["https://example.org/dino.pth", "no/such/file.pth", "vit_small_patch16_224.dino"])
def test_a_missing_path_is_never_looked_for_elsewhere(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("opened a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    with pytest.raises(ValueError, match=r"there is no such file \(weights are read from local files only\)"):
        tiny(weights=place)


def test_weights_of_another_shape_are_told_by_the_keys_that_would_fit_them(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"image_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    torch.save(VisionTransformer(**shape).state_dict(), tmp_path / "weights.pt")
    expected = r"; the file is of backbone.patch_size=8 backbone.embed_dim=64 backbone.depth=2 backbone.mlp_ratio=4.0$"
    with pytest.raises(ValueError, match=expected):
        load_weights(tiny(), tmp_path / "weights.pt")


def test_a_graph_is_no_weight_file(tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match="a graph for inference is not read as weights"):
        load_weights(tiny(), tmp_path / "graph.onnx")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    expected = r"neither a run directory \(no checkpoints\) nor one of Hugging Face \(no model.safetensors\)"
    with pytest.raises(ValueError, match=expected):
        load_weights(tiny(), tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="it is a run directory; name a checkpoint in it"):
        load_weights(tiny(), tmp_path)


def test_weights_and_pretrained_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"backbone\.weights=a\.pt and backbone.pretrained=true exclude each other"):
        ConvolutionalBackbone(architecture="resnet18", weights="a.pt", pretrained=True)


@pytest.mark.parametrize("side", [2, 3, 6])
def test_a_position_table_of_another_size(tmp_path: Path, side: int) -> None:
    """Interpolated once while loading, the network equals one that interpolates in every forward pass."""
    torch.manual_seed(0)
    source = tiny()  # a table of 4 x 4
    randomize(source)
    torch.save(source.state_dict(), tmp_path / "source.pt")
    backbone = tiny(image_size=8 * side)
    report = load_weights(backbone, tmp_path / "source.pt")
    assert report.notices == (f"position table interpolated from 4 x 4 to {side} x {side} patches",)
    images = torch.randn(2, 3, 8 * side, 8 * side)
    torch.testing.assert_close(backbone(images), source(images))


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_a_first_convolution_for_other_channels(tmp_path: Path, channels: int) -> None:
    torch.manual_seed(0)
    source = tiny()
    torch.save(source.state_dict(), tmp_path / "source.pt")
    backbone = tiny(channels=channels)
    report = load_weights(backbone, tmp_path / "source.pt")
    assert report.notices == (f"patch_embed.proj.weight adapted from 3 to {channels} channels",)
    gray = torch.randn(2, 1, 32, 32)
    if channels in (1, 6):  # whole rounds of the three: a gray image gets the same answer
        expected = source(gray.expand(-1, 3, -1, -1))
        torch.testing.assert_close(backbone(gray.expand(-1, channels, -1, -1)), expected, rtol=1e-4, atol=1e-5)


def test_adapted_channels_are_scaled() -> None:
    weight = torch.arange(1.0, 4.0).reshape(1, 3, 1, 1)
    assert adapt_channels(weight, 1).flatten().tolist() == [6]
    assert adapt_channels(weight, 4).flatten().tolist() == [0.75, 1.5, 2.25, 0.75]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_original_names_and_back(model: StudentTeacher, batch_norm: bool) -> None:
    if batch_norm:
        head = DINOHead(in_dim=16, out_dim=12, hidden_dim=16, bottleneck_dim=8, batch_norm=True)
        model = StudentTeacher(MultiCropModel(tiny(), head))
    state = model.state_dict()
    renamed = original_names(state)
    assert list(renamed) == ["student", "teacher"]
    assert "module.backbone.cls_token" in renamed["student"]
    assert ("module." if batch_norm else "") + "head.last_layer.weight_v" in renamed["teacher"]
    back = from_original_names(renamed)
    assert list(back) == list(state)
    assert all(back[name] is value for name, value in state.items())


def test_names_that_are_nobodys() -> None:
    with pytest.raises(ValueError, match=r"loss\.center belongs neither to a student nor to a teacher"):
        original_names({"loss.center": torch.ones(1)})
    with pytest.raises(ValueError, match="the original checkpoint has no student"):
        from_original_names({"teacher": {}})


@pytest.mark.parametrize("channels", [3, 1])
def test_pretrained_weights_of_torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, channels: int) -> None:
    """The real way to them, with a file of random weights where torch keeps its downloads."""
    import torchvision

    torch.manual_seed(0)
    theirs = torchvision.models.resnet18().eval()  # as initialised: with any weights its answers would reach 10^8
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(theirs.state_dict(), cache / Path(torchvision.models.ResNet18_Weights.DEFAULT.url).name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    backbone = ConvolutionalBackbone(architecture="resnet18", channels=channels, pretrained=True).eval().double()
    theirs.fc = torch.nn.Identity()
    gray = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    expected = theirs.double()(gray.expand(-1, 3, -1, -1))
    # The sum over channels was rounded to float32.
    error = (backbone(gray.expand(-1, channels, -1, -1)) - expected).abs().max()
    assert error < 1e-5 * expected.abs().max()


PRETRAINED = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from dino.backbone import TimmBackbone, VisionTransformer
torch.manual_seed(0)
source = VisionTransformer(image_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6)
def build(kind):
    if kind == "ours":
        return VisionTransformer(image_size=32, patch_size=16, embed_dim=384, depth=12, num_heads=6, pretrained=True)
    return TimmBackbone(model_name="vit_small_patch16_224.dino", image_size=224, pretrained=True).eval()
try:
    build("ours")
except ValueError as error:
    print("refused:", error)
folder = Path(sys.argv[1]) / "hub" / "models--timm--vit_small_patch16_224.dino"
(folder / "snapshots" / "abc").mkdir(parents=True)
(folder / "refs").mkdir()
(folder / "refs" / "main").write_text("abc")
save_file(source.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
images = torch.randn(1, 3, 32, 32)
torch.testing.assert_close(build("ours")(images), source(images), rtol=1e-4, atol=1e-5)
images = torch.randn(1, 3, 224, 224)
torch.testing.assert_close(build("timm")(images), source(images), rtol=1e-4, atol=1e-5)
print("loaded")
"""


@pytest.mark.slow
def test_pretrained_weights_of_timm(tmp_path: Path) -> None:
    """Without a connection: first refused in one sentence, then found where the hub keeps its downloads."""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment = {name: value for name, value in environment.items() if name not in ("HF_HUB_CACHE", "TORCH_HOME")}
    command = [sys.executable, "-c", PRETRAINED, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    refused, loaded = result.stdout.splitlines()
    assert refused.startswith("refused: backbone.pretrained=true: the weights could not be fetched")
    assert refused.endswith("with a file at hand use backbone.weights=PATH")
    assert loaded == "loaded"
