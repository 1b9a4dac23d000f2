"""Weights of any origin into a backbone: which it is, all of it or an error in words, and never a download."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import train
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from dino.backbone import ConvolutionalBackbone, VisionTransformer, original_names
from dino.backbone.layouts import to_hugging_face
from dino.export import export
from dino.model import DINOHead, MultiCropModel, StudentTeacher
from dino.trained import Preparation, Trained, load_trained

# As no published ViT: 64 features, so one head of 64.
SHAPE: dict[str, Any] = {"image_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps on the digits."""
    folder = tmp_path_factory.mktemp("runs")
    done = train("run_dir=run", "evaluation=knn", "trainer.save_every_steps=6", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def model() -> StudentTeacher:
    """Student and teacher with different weights."""
    torch.manual_seed(0)
    model = StudentTeacher(MultiCropModel(VisionTransformer(**SHAPE), DINOHead(in_dim=64, out_dim=12, hidden_dim=16)))
    with torch.no_grad():
        for tensor in model.teacher.state_dict().values():
            tensor += 0.05 * torch.randn_like(tensor)
    return model


def features(trained: Trained, size: int = 32) -> Tensor:
    channels = trained.settings.get("channels", 3)
    images = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: Tensor = trained.backbone(images)
    return found


# ---------------------------------------------------------------------- runs


def test_a_run_gives_its_teacher_as_it_is_in_the_newest_checkpoint(run_dir: Path) -> None:
    trained = load_trained(run_dir)
    state = torch.load(run_dir / "checkpoints" / "last.pt", weights_only=True)
    for name, tensor in trained.backbone.state_dict().items():
        assert torch.equal(tensor, state["model"][f"teacher.backbone.{name}"]), name
    assert (trained.step, trained.network) == (12, "teacher")
    assert not trained.backbone.training
    assert trained.preparation.size == 16
    assert len(trained.preparation.mean) == 1


def test_student_and_teacher_best_and_earlier_steps_can_be_chosen(run_dir: Path) -> None:
    teacher, student = load_trained(run_dir), load_trained(run_dir, network="student")
    earlier = load_trained(run_dir, checkpoint="6")
    assert earlier.step == 6
    assert load_trained(run_dir, checkpoint="best").step in (6, 12)
    for other in (student, earlier):
        assert not torch.equal(features(teacher, 16), features(other, 16))


def test_a_checkpoint_that_was_copied_elsewhere_tells_all_by_itself(run_dir: Path, tmp_path: Path) -> None:
    shutil.copy((run_dir / "checkpoints" / "last.pt").resolve(), tmp_path / "mine.pt")
    alone, of_run = load_trained(tmp_path / "mine.pt"), load_trained(run_dir)
    assert torch.equal(features(alone, 16), features(of_run, 16))
    assert (alone.preparation, alone.settings, alone.step) == (of_run.preparation, of_run.settings, of_run.step)


def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(run_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"--checkpoint 7: .* it has 12, 6"):
        load_trained(run_dir, checkpoint="7")
    with pytest.raises(ValueError, match="use last, best or the number of a step"):
        load_trained(run_dir, checkpoint="newest")


def test_half_a_checkpoint_is_refused(run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy, symlinks=True)
    file = copy / "checkpoints" / "step_00000012.pt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="damaged: its size"):
        load_trained(copy, checkpoint="12")
    assert load_trained(copy).step == 6  # the newest that is whole
    shutil.copy(file, tmp_path / "half.pt")
    with pytest.raises(ValueError, match=r"half\.pt: (not a readable weight file|the file is damaged)"):
        load_trained(tmp_path / "half.pt")


# ---------------------------------------------------------------------- files of others


@pytest.mark.parametrize("size", [32, 48])
def test_the_originals_checkpoint_is_recognised(model: StudentTeacher, tmp_path: Path, size: int) -> None:
    torch.save({**original_names(model.state_dict()), "epoch": 3}, tmp_path / "checkpoint.pth")
    for network in ("student", "teacher"):
        trained = load_trained(tmp_path / "checkpoint.pth", network=network)
        with torch.no_grad():
            images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
            assert torch.equal(features(trained, size), getattr(model, network).backbone(images))
        assert "loaded 30 of 30 tensors" in str(trained.report)
        assert trained.settings == {
            "_target_": "dino.backbone.VisionTransformer",
            "channels": 3,
            "mlp_ratio": 4.0,
            **SHAPE,
        }


def test_a_hugging_face_folder_tells_its_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = VisionTransformer(**{**SHAPE, "num_heads": 4}).eval()
    save_file(to_hugging_face(backbone.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "num_attention_heads": 4}))
    trained = load_trained(tmp_path)
    assert trained.settings["num_heads"] == 4
    assert all(torch.equal(value, backbone.state_dict()[name]) for name, value in trained.backbone.state_dict().items())


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "efficientnet_b0"])
def test_convolutional_networks_are_recognised_with_their_classifier_left_aside(
    architecture: str, tmp_path: Path
) -> None:
    import torchvision.models

    torch.manual_seed(0)
    network = torchvision.models.get_model(architecture, weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    trained = load_trained(tmp_path / "weights.pth")
    assert isinstance(trained.backbone, ConvolutionalBackbone)
    assert trained.settings["architecture"] == architecture
    assert len(trained.report.ignored) == 2
    network.fc = network.classifier = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        assert_close(trained.backbone.double()(images), network.double()(images), rtol=1e-9, atol=1e-11)


def test_a_timm_network_is_named_by_hand(tmp_path: Path) -> None:
    from timm import create_model

    torch.manual_seed(0)
    network = create_model("convnext_atto", num_classes=7).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"cannot be told from its tensors .* --backbone"):
        load_trained(tmp_path / "weights.pth")
    trained = load_trained(tmp_path / "weights.pth", backbone="timm/convnext_atto")
    network.reset_classifier(0)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(trained.backbone(images), network(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.update({"blocks.1.norm1.wieght": state.pop("blocks.1.norm1.weight")}), "norm1.wieght"),
        (lambda state: state.pop("cls_token"), "cls_token"),
        (lambda state: state.update({"blocks.0.ls1.gamma": torch.ones(64)}), "blocks.0.ls1.gamma"),
        (lambda state: state.update({"norm.weight": torch.ones(32)}), r"norm.weight \[32\] instead of \[64\]"),
    ],
)
def test_one_tensor_that_does_not_fit_is_named(change: Any, says: str, tmp_path: Path) -> None:
    state = dict(VisionTransformer(**SHAPE).state_dict())
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=says):
        load_trained(tmp_path / "weights.pth")


def test_student_where_there_is_only_a_teacher_is_refused(model: StudentTeacher, tmp_path: Path) -> None:
    torch.save({"teacher": original_names(model.state_dict())["teacher"]}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="there is no student in it, only the other network"):
        load_trained(tmp_path / "checkpoint.pth", network="student")


def test_a_classification_head_is_left_aside_by_name(tmp_path: Path) -> None:
    state = {**VisionTransformer(**SHAPE).state_dict(), "head.weight": torch.ones(10, 64), "head.bias": torch.ones(10)}
    torch.save(state, tmp_path / "weights.pth")
    assert load_trained(tmp_path / "weights.pth").report.ignored == ("head.weight", "head.bias")


def test_what_lies_beside_weights_may_be_somebody_elses(tmp_path: Path) -> None:
    torch.save(VisionTransformer(**SHAPE).state_dict(), tmp_path / "weights.pth")
    (tmp_path / "weights.json").write_text('{"backbone": "resnet", "step": "last", "num_heads": null}')
    trained = load_trained(tmp_path / "weights.pth")
    assert trained.settings["embed_dim"] == 64
    assert trained.step is None
    assert "1 attention heads, as wide as published ones" in str(trained.report)


def test_a_file_cannot_have_anything_but_a_backbone_built(tmp_path: Path) -> None:
    torch.save(VisionTransformer(**SHAPE).state_dict(), tmp_path / "weights.pth")
    (tmp_path / "weights.json").write_text('{"backbone": {"_target_": "torch.hub.load", "repo_or_dir": "a/b"}}')
    with pytest.raises(ValueError, match=r"it names torch.hub.load, which is no backbone of this project"):
        load_trained(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"_target_": "dino.backbone.weights.torch.hub.load", "repo_or_dir": "a/b"}, "it names dino.backbone.weights"),
        ({"_target_": "dino.loss.DINOLoss"}, "it names dino.loss.DINOLoss, which is no backbone of this project"),
        ({"_target_": None}, "it names None, which is no backbone"),
        (
            {
                "_target_": "dino.backbone.VisionTransformer",
                "patch_size": {"_target_": "torch.load", "f": "other.pt", "weights_only": False},
            },
            "it names torch.load inside of its backbone",
        ),
    ],
)
def test_no_other_way_leads_to_something_that_is_called(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    torch.save(VisionTransformer(**SHAPE).state_dict(), tmp_path / "weights.pth")
    (tmp_path / "weights.json").write_text(json.dumps({"backbone": settings}))
    with pytest.raises(ValueError, match=says):
        load_trained(tmp_path / "weights.pth")


def test_the_network_of_a_folder_of_hugging_face_is_known(run_dir: Path, tmp_path: Path) -> None:
    (exported,) = export(load_trained(run_dir, network="student"), ["huggingface"], tmp_path)
    assert load_trained(exported.path).network == "student"
    (exported,) = export(load_trained(run_dir), ["huggingface"], tmp_path)
    with pytest.raises(ValueError, match="--network student: it holds the teacher alone"):
        load_trained(exported.path, network="student")


@pytest.mark.parametrize(
    ("processor", "resize", "size"),
    [
        ({"size": {"shortest_edge": 64}, "crop_size": {"height": 48, "width": 48}, "do_center_crop": True}, 64, 48),
        ({"size": {"height": 48, "width": 48}}, 48, 48),
        ({"size": 96, "crop_size": 80}, 96, 96),
        ({}, 16, 16),
    ],
)
def test_a_foreign_processor_says_how_images_are_prepared(
    run_dir: Path, tmp_path: Path, processor: dict[str, Any], resize: int, size: int
) -> None:
    (exported,) = export(load_trained(run_dir), ["huggingface"], tmp_path)
    (exported.path / "dino.json").unlink()
    content = {"image_mean": [0.5], "image_std": [0.25], **processor}
    (exported.path / "preprocessor_config.json").write_text(json.dumps(content))
    assert load_trained(exported.path).preparation == Preparation(mean=[0.5], std=[0.25], resize=resize, size=size)


def test_a_wrong_path_is_an_error_and_no_download(tmp_path: Path) -> None:
    """In a process without a network interface of its own making: proxies that answer nothing."""
    dead = {**os.environ, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    code = "from pathlib import Path; from dino.trained import load_trained; load_trained(Path('vit_small.pth'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=dead, capture_output=True, text=True)
    assert done.returncode == 1
    expected = "vit_small.pth: there is no such run directory or file (nothing is downloaded)"
    assert done.stderr.splitlines()[-1] == f"ValueError: {expected}"


def test_another_image_size_resamples_the_position_table(run_dir: Path) -> None:
    trained = load_trained(run_dir)
    larger = trained.at_size(24)
    assert larger.image_size == 24
    assert_close(features(larger, 24), features(trained, 24), rtol=0, atol=0)
    with pytest.raises(ValueError, match="instead of 25 use 24 or 28"):
        trained.at_size(25)
