"""Exports: what the library that owns each format makes of the file equals what the network gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import DINO, run, train
from torch import Tensor

from dino.backbone import VisionTransformer, from_original_names
from dino.dataset.evaluation_loader import resize_and_cut
from dino.evaluation import normalized
from dino.export import FORMATS, export
from dino.export.formats import original_arguments
from dino.trained import Trained, load_trained

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    done = train("run_dir=run", "evaluation=knn", "trainer.max_steps=3", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory, reference: Any) -> Trained:
    """The original's own tensors (tests/reference/official_dino/model.npz), in float32, as its training saves them."""
    data = reference("model.npz")
    state = {name.removeprefix("state/"): torch.from_numpy(v).float() for name, v in data.items() if "state/" in name}
    path = tmp_path_factory.mktemp("original") / "checkpoint.pth"
    torch.save({"student": {f"module.{name}": value for name, value in state.items()}, "teacher": state}, path)
    path.with_suffix(".json").write_text('{"num_heads": 3}')  # of 8 features, which no tensor tells
    return load_trained(path)


def images_of(trained: Trained, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(5, trained.settings["channels"], size, size, generator=generator)


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("name", list(FORMATS))
def test_the_owner_of_each_format_gets_the_same_features(vit: Trained, name: str, size: int, tmp_path: Path) -> None:
    (exported,) = export(vit, [name], tmp_path, [(size, size)])
    sized = vit if size == vit.image_size or not FORMATS[name].one_size else vit.at_size(size)
    images = images_of(vit, size)
    with torch.no_grad():
        expected = vit.backbone(images)
        found = FORMATS[name].features(sized, exported.path, images)
    assert expected.abs().max() > 0.1
    assert (found - expected).abs().max() < TOLERANCE * max(1.0, float(expected.abs().max()))
    assert exported.largest_difference < TOLERANCE * max(1.0, exported.largest_feature)


@pytest.mark.parametrize("name", list(FORMATS))
def test_what_was_exported_is_loaded_again_tensor_by_tensor(vit: Trained, name: str, tmp_path: Path) -> None:
    if name == "onnx":
        pytest.skip("a graph for inference; it is not read as weights")
    (exported,) = export(vit, [name], tmp_path)
    back = load_trained(exported.path)
    expected = vit.backbone.state_dict()
    assert list(back.backbone.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in back.backbone.state_dict().items())
    assert back.settings["num_heads"] == vit.settings["num_heads"]


def test_the_sidecar_says_what_it_is_and_how_far_it_is_off(run_dir: Path, tmp_path: Path) -> None:
    (exported,) = export(load_trained(run_dir), ["safetensors"], tmp_path)
    beside = json.loads(exported.path.with_suffix(".json").read_text())
    assert beside["check"]["largest_difference"] == 0.0
    assert beside["backbone"]["patch_size"] == 4
    assert (beside["network"], beside["step"], beside["embed_dim"]) == ("teacher", 3, 32)
    assert set(beside["preparation"]) == {"mean", "std", "resize", "size"}
    assert beside["settings"]["loss.teacher_temp"] is not None
    assert load_trained(exported.path).preparation == load_trained(run_dir).preparation


def test_a_run_of_ours_becomes_the_originals_checkpoint_with_heads(run_dir: Path, tmp_path: Path) -> None:
    (exported,) = export(load_trained(run_dir), ["original"], tmp_path)
    networks = torch.load(exported.path, weights_only=True)
    ours = torch.load(run_dir / "checkpoints" / "last.pt", weights_only=True)["model"]
    back = from_original_names(networks)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    # What the original's evaluations do with it (utils.py, load_pretrained_weights).
    teacher = {name.replace("module.", "").replace("backbone.", ""): v for name, v in networks["teacher"].items()}
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= teacher.keys()


def test_the_originals_tensors_go_through_ours_and_come_out_the_same(vit: Trained, tmp_path: Path) -> None:
    (exported,) = export(vit, ["original"], tmp_path)
    there, back = (torch.load(path, weights_only=True) for path in (vit.file, exported.path))
    for network in ("student", "teacher"):
        assert list(back[network]) == list(there[network])  # the head too
        assert all(torch.equal(back[network][name], there[network][name]) for name in there[network])


def test_onnx_takes_any_number_of_images(vit: Trained, tmp_path: Path) -> None:
    (exported,) = export(vit, ["onnx"], tmp_path)
    for count in (1, 2, 5):
        images = images_of(vit, 32)[:count]
        with torch.no_grad():
            difference = FORMATS["onnx"].features(vit, exported.path, images) - vit.backbone(images)
        assert difference.abs().max() < TOLERANCE


def test_onnx_takes_images_that_are_no_squares(vit: Trained, tmp_path: Path) -> None:
    (exported,) = export(vit, ["onnx"], tmp_path, [(32, 56)])
    assert exported.path.name.endswith("32x56.onnx")
    images = torch.randn(3, vit.settings["channels"], 32, 56, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        difference = FORMATS["onnx"].features(vit, exported.path, images) - vit.backbone(images)
    assert difference.abs().max() < TOLERANCE
    with pytest.raises(ValueError, match=r"timm: position tables are square, so not for --size 32x56; onnx has any"):
        export(vit, ["onnx", "timm"], tmp_path / "both", [(32, 56)])
    assert not (tmp_path / "both").exists()
    with pytest.raises(ValueError, match="instead of 33 use 32 or"):
        export(vit, ["onnx"], tmp_path, [(32, 33)])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"embed_dim": 384, "num_heads": 6, "patch_size": 8}, "--arch vit_small --patch_size 8"),
        ({"embed_dim": 192, "num_heads": 3, "patch_size": 16}, "--arch vit_tiny --patch_size 16"),
        ({"embed_dim": 192, "num_heads": 3, "patch_size": 16, "image_size": 96}, None),
        ({"embed_dim": 192, "num_heads": 3, "patch_size": 16, "channels": 1}, None),
        ({"embed_dim": 64, "num_heads": 1, "patch_size": 16}, None),
    ],
)
def test_the_originals_scripts_are_named_for_networks_that_they_build(
    settings: dict[str, Any], words: str | None
) -> None:
    settings = {"image_size": 224, "depth": 12, **settings}
    assert original_arguments(VisionTransformer(**settings), settings) == words


def test_hugging_face_prepares_photographs_as_we_do(run_dir: Path, tmp_path: Path) -> None:
    """One that is no square: short side resized, centre cut out."""
    transformers = pytest.importorskip("transformers")
    trained = load_trained(run_dir)
    (exported,) = export(trained, ["huggingface"], tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(exported.path, local_files_only=True)
    photo = torch.randint(0, 256, (1, 40, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prepared = trained.preparation
    ours = normalized(resize_and_cut(photo[None], prepared.resize, prepared.size), prepared.mean, prepared.std)
    theirs = processor(photo, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() * prepared.std[0] < 0.02  # pixels of 0..1: it rounds otherwise


def test_a_format_without_a_place_for_the_network_says_so(tmp_path: Path) -> None:
    import torchvision.models

    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet.pth")
    resnet = load_trained(tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"nothing was written, .*huggingface: only ViTs"):
        export(resnet, ["timm", "huggingface"], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    for name in ("safetensors", "original", "timm", "onnx"):
        (exported,) = export(resnet.at_size(64), [name], tmp_path / name)
        assert exported.equal, exported
    with pytest.raises(ValueError, match="--format tims: use one or more of safetensors, original, timm"):
        export(resnet, ["tims"], tmp_path)


def test_the_command_writes_into_the_run_and_tells_the_difference(run_dir: Path, tmp_path: Path) -> None:
    words = ["export", str(run_dir), "--format", "safetensors,timm", "--size", "16", "--size", "24"]
    done = run([DINO, *words], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "loaded 18 of 18 tensors" in done.stdout
    assert done.stdout.count("largest difference") == 3  # timm at two sizes, safetensors once
    assert "timm.create_model(model_name='vit_small_patch16_224'" in done.stdout
    assert len(list((run_dir / "export").glob("*.json"))) == 3
