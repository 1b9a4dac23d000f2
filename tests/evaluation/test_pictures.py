"""Pictures of a few images: drawn from the right numbers, in the right place, and without a trace in the run."""

import copy
import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dino.augmentation import MultiCrop
from dino.backbone import ConvolutionalBackbone, VisionTransformer
from dino.dataset import ImageDataset, Splits, StackedSource, spread_indices
from dino.evaluation import EvaluationInputs, PicturesEvaluator, evaluation_mode, normalized
from dino.evaluation.pictures import CELL
from dino.model import DINOHead, MultiCropModel, StudentTeacher

MakeInputs = Callable[..., EvaluationInputs]
MakeDataset = Callable[..., ImageDataset]
RunRanks = Callable[..., list[Any]]

STEP = Path("pictures/step_00000132")
STRIDE, TOP = CELL + 4, 20  # of rows and columns; the first row of pixels below the labels


def sheet(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.array(picture.convert("RGB"))


def cell(pixels: np.ndarray, row: int, column: int) -> np.ndarray:
    """uint8 [CELL, CELL, 3]."""
    return pixels[TOP + row * STRIDE :, 4 + column * STRIDE :][:CELL, :CELL]


def held_out(inputs: EvaluationInputs) -> Tensor:
    splits = inputs.dataset.evaluation()
    assert splits is not None
    assert splits[1].images is not None
    return splits[1].images


def teacher_features(inputs: EvaluationInputs, images: Tensor) -> np.ndarray:
    with torch.no_grad(), evaluation_mode(inputs.model):
        return inputs.model.teacher.backbone(normalized(images, *inputs.dataset.normalization())).double().numpy()


def test_every_file_of_the_contract_is_there_and_small(make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    assert PicturesEvaluator().evaluate(inputs) == {}
    files = {str(path.relative_to(inputs.directory)) for path in inputs.directory.rglob("*") if path.is_file()}
    names = ("attention.png", "neighbours.png", "distributions.json")
    assert files == {"pictures/views.png", *(f"{STEP}/{name}" for name in names)}
    assert all((inputs.directory / name).stat().st_size < 60_000 for name in files)


def test_the_neighbours_are_the_nearest_other_images(make_inputs: MakeInputs) -> None:
    inputs = make_inputs(limit_samples=50)
    PicturesEvaluator(num_images=3).evaluate(inputs)
    images = held_out(inputs)[torch.from_numpy(spread_indices(360, 50))]
    features = teacher_features(inputs, images)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    pixels = sheet(inputs.directory / STEP / "neighbours.png")
    assert pixels.shape == (TOP + 3 * STRIDE, 4 + 6 * STRIDE, 3)
    for row, query in enumerate(spread_indices(50, 3)):
        others = sorted((other for other in range(50) if other != query), key=lambda i: -features[i] @ features[query])
        for column, shown in enumerate([query, *others[:5]]):
            expected = images[shown, 0].numpy().repeat(7, axis=0).repeat(7, axis=1)
            assert np.array_equal(cell(pixels, row, column)[..., 1], expected), (row, column)


class Attends(VisionTransformer):
    """Its class token attends to one patch: head h of image n to patch 3 n + h."""

    def last_attention(self, images: Tensor) -> Tensor:
        attention = super().last_attention(images)
        attention[:, :, 0] = 0
        for image in range(len(attention)):
            for head in range(attention.shape[1]):
                attention[image, head, 0, 1 + 3 * image + head] = 0.25  # behind the class token; row by row
        return attention


def test_attention_to_a_patch_is_drawn_where_the_patch_is(make_inputs: MakeInputs) -> None:
    backbone = Attends(image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, channels=1)
    head = DINOHead(in_dim=16, out_dim=32, hidden_dim=24, bottleneck_dim=8)
    inputs = make_inputs(model=StudentTeacher(MultiCropModel(backbone, head)))
    PicturesEvaluator(num_images=4).evaluate(inputs)
    pixels = sheet(inputs.directory / STEP / "attention.png")
    assert pixels.shape == (TOP + 4 * STRIDE, 4 + 4 * STRIDE, 3)  # image, mean, two heads
    for image in range(4):
        for column, patches in ((1, (0, 1)), (2, (0,)), (3, (1,))):
            bright = cell(pixels, image, column)[..., 1] > 128
            expected = np.zeros((4, 4), dtype=bool)
            for patch in patches:
                expected.flat[3 * image + patch] = True
            assert np.array_equal(bright, expected.repeat(28, axis=0).repeat(28, axis=1)), (image, column)


def test_attention_is_that_of_the_teacher_and_images_stand_beside_it(make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    PicturesEvaluator(num_images=2).evaluate(inputs)
    images = held_out(inputs)[torch.from_numpy(spread_indices(360, 2))]
    with torch.no_grad(), evaluation_mode(inputs.model):
        backbone = inputs.model.teacher.backbone
        weights = backbone.last_attention(normalized(images, [0.3], [0.37]))[:, :, 0, 1:].reshape(2, 2, 4, 4).numpy()
    pixels = sheet(inputs.directory / STEP / "attention.png")
    for row in range(2):
        assert np.array_equal(cell(pixels, row, 0)[::7, ::7, 0], images[row, 0].numpy())
        for column, map_ in enumerate([weights[row].mean(axis=0), *weights[row]]):
            green = cell(pixels, row, 1 + column)[::28, ::28, 1]
            assert np.all(
                np.diff(green.flat[map_.flatten().argsort()].astype(int)) >= 0
            )  # brighter with more attention
            assert green.max() == 255


def test_the_distributions_are_those_of_the_fixed_views(make_inputs: MakeInputs) -> None:
    """Of 9 images in one batch; the temperature and the center are those of the run."""
    inputs = make_inputs(limit_samples=9)
    PicturesEvaluator().evaluate(inputs)
    found = json.loads((inputs.directory / STEP / "distributions.json").read_text())
    views = inputs.augmentation.photometric(
        inputs.augmentation(inputs.dataset.evaluation()[1], spread_indices(360, 9), seed=5, epoch=0)
    )
    with torch.no_grad(), evaluation_mode(inputs.model):
        logits = inputs.model.teacher_forward(views.global_views).logits().double().numpy()
        student, _ = inputs.model.student_forward(views.global_views, views.local_views)
    scores = (logits - np.linspace(-0.1, 0.1, 32)) / 0.05
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    entropies = -(probabilities * np.log(probabilities)).sum(axis=1)
    assert found["teacher"]["entropy"]["counts"] == np.histogram(entropies, 40, (0, np.log(32)))[0].tolist()
    assert found["teacher"]["concentration"]["mass"][0] == pytest.approx(probabilities.max(axis=1).mean(), rel=1e-4)
    scores = student.logits().detach().double().numpy() / 0.1
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    assert found["student"]["concentration"]["mass"][0] == pytest.approx(probabilities.max(axis=1).mean(), rel=1e-4)
    assert sum(found["student"]["entropy"]["counts"]) == 9 * 5  # 2 global and 3 local views


def test_a_collapsed_teacher_and_a_diverged_one_are_drawn_too(make_inputs: MakeInputs) -> None:
    for value in (0.0, torch.nan):
        inputs = make_inputs(limit_samples=20)
        with torch.no_grad():
            for parameter in inputs.model.parameters():
                parameter.fill_(value)
        PicturesEvaluator().evaluate(inputs)
        assert (inputs.directory / STEP / "attention.png").exists()
        assert "NaN" not in (inputs.directory / STEP / "distributions.json").read_text()


def test_views_are_drawn_once_and_anew_by_a_new_run(make_inputs: MakeInputs) -> None:
    evaluator, inputs = PicturesEvaluator(), make_inputs(limit_samples=10)
    path = inputs.directory / "pictures" / "views.png"
    evaluator.evaluate(inputs)
    first = path.read_bytes()
    assert sheet(path).shape[1] == 4 + 2 * (64 + 4) + 3 * (52 + 4)  # views of 16 pixels four times as large, and labels
    path.write_bytes(b"of an earlier run")
    evaluator.evaluate(make_inputs(limit_samples=10))
    assert path.read_bytes() == b"of an earlier run"
    evaluator.evaluate(make_inputs(limit_samples=10, untrained=True, step=0))
    assert path.read_bytes() == first


def test_without_local_views(make_inputs: MakeInputs, make_augmentation: Callable[..., MultiCrop]) -> None:
    inputs = make_inputs(augmentation=make_augmentation(num_local_views=0), limit_samples=10)
    PicturesEvaluator().evaluate(inputs)
    found = json.loads((inputs.directory / STEP / "distributions.json").read_text())
    assert sum(found["student"]["entropy"]["counts"]) == 20


@dataclasses.dataclass(kw_only=True)
class Colours(ImageDataset):
    """20 training images of noise, and as many held-out ones."""

    def _open(self) -> Splits:
        draw = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (20, self.channels, 40, 40), dtype=torch.uint8, generator=draw)
        source = StackedSource(images, None, "colours")
        return Splits(source, bank=source, held_out=source)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_number_of_channels_and_a_network_without_attention(
    make_inputs: MakeInputs, make_augmentation: Callable[..., MultiCrop], channels: int
) -> None:
    sizes = {"global_size": 32, "local_size": 16, "evaluation_resize": 128, "evaluation_size": 128}
    statistics = {"channels": channels, "mean": [0.4] * channels, "std": [0.3] * channels}
    dataset = Colours(name="colours", batch_size=8, num_workers=0, **sizes, **statistics)
    backbone = ConvolutionalBackbone(architecture="resnet18", channels=channels)
    head = DINOHead(in_dim=backbone.embed_dim, out_dim=32, hidden_dim=8, bottleneck_dim=4)
    model = StudentTeacher(MultiCropModel(backbone, head))
    augmentation = make_augmentation(global_size=32, local_size=16, **statistics)
    inputs = make_inputs(dataset=dataset, augmentation=augmentation, model=model)
    PicturesEvaluator(num_images=2).evaluate(inputs)
    assert {path.name for path in (inputs.directory / STEP).iterdir()} == {"neighbours.png", "distributions.json"}
    shown = cell(sheet(inputs.directory / STEP / "neighbours.png"), 0, 0)  # 128 pixels shrunk to 112
    assert (shown[..., 0] == shown[..., 1]).all() == (channels < 3)
    assert shown.std() > 10


def test_nothing_of_the_run_is_changed(make_inputs: MakeInputs) -> None:
    inputs = make_inputs(limit_samples=100)
    inputs.model.student.backbone.eval()  # an unusual mode, to see that it is not simply set to training
    modes = [part.training for part in inputs.model.modules()]
    state = copy.deepcopy(inputs.model.state_dict() | inputs.loss.state_dict())
    streams = torch.get_rng_state(), np.random.get_state()[1].tolist()
    PicturesEvaluator().evaluate(inputs)
    assert [part.training for part in inputs.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert np.random.get_state()[1].tolist() == streams[1]
    for name, value in (inputs.model.state_dict() | inputs.loss.state_dict()).items():
        assert torch.equal(value, state[name]), name


def test_several_ranks_and_workers_draw_what_one_process_does(
    make_inputs: MakeInputs, make_digits: MakeDataset, run_ranks: RunRanks, tmp_path: Path
) -> None:
    def contents(inputs: EvaluationInputs) -> dict[str, bytes]:
        found = {str(path.relative_to(inputs.directory)): path for path in inputs.directory.rglob("*.*")}
        return {name: path.read_bytes() for name, path in found.items()}

    evaluator = PicturesEvaluator()
    one = make_inputs(directory=tmp_path / "one")
    evaluator.evaluate(one)
    several = make_inputs(directory=tmp_path / "several")
    assert run_ranks(evaluator.evaluate, 3, several) == [{}] * 3
    workers = make_inputs(directory=tmp_path / "workers", dataset=make_digits(num_workers=2))
    evaluator.evaluate(workers)
    assert contents(one) == contents(several) == contents(workers)
    assert len(contents(one)) == 4


def test_training_is_the_same_bit_for_bit_with_pictures_and_without(tmp_path: Path) -> None:
    settings = ["trainer.limit_evaluation_samples=50", "backbone.drop_path_rate=0.3", "evaluation.knn.every_epochs=1"]
    with_pictures = ["evaluation=[knn,pictures]", "evaluation.pictures.every_epochs=1"]
    for name, extra in (("without", ["evaluation=[knn]"]), ("with", with_pictures)):
        result = command_line.train(f"run_dir={name}", *settings, *extra, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    states = [command_line.last_state(tmp_path / name) for name in ("without", "with")]
    parts = ("model", "loss", "optimizer", "rng", "epoch_loss", "loader")
    assert not command_line.differences(*({part: state[part] for part in parts} for state in states))
    folders = sorted(path.name for path in (tmp_path / "with" / "pictures").iterdir())
    assert folders == ["step_00000000", "step_00000006", "step_00000012", "views.png"]


@pytest.mark.parametrize("limit", [1, 2])
def test_fewer_images_than_ranks_neighbours_and_pictures(
    make_inputs: MakeInputs, run_ranks: RunRanks, limit: int
) -> None:
    inputs = make_inputs(limit_samples=limit)
    assert run_ranks(PicturesEvaluator().evaluate, 3, inputs) == [{}] * 3
    pixels = sheet(inputs.directory / STEP / "neighbours.png")
    assert pixels.shape == (TOP + limit * STRIDE, 4 + limit * STRIDE, 3)


def test_without_held_out_images_and_labels_it_takes_those_of_training(
    make_inputs: MakeInputs, make_noise: MakeDataset
) -> None:
    inputs = make_inputs(dataset=make_noise(labelled=False, has_held_out=False))
    PicturesEvaluator(num_images=1).evaluate(inputs)
    image = inputs.dataset.train().images
    assert image is not None
    shown = cell(sheet(inputs.directory / STEP / "neighbours.png"), 0, 0)[::7, ::7, 0]
    assert np.array_equal(shown, image[spread_indices(40, 1)[0], 0].numpy())


def test_broken_files_are_left_out(make_inputs: MakeInputs, make_folder: Callable[[], ImageDataset]) -> None:
    inputs = make_inputs(dataset=make_folder())
    splits = inputs.dataset.evaluation()
    assert splits is not None
    for index in (0, 3):
        Path(splits[1].name(index)).write_bytes(b"not an image")
    PicturesEvaluator().evaluate(inputs)
    pixels = sheet(inputs.directory / STEP / "neighbours.png")
    assert pixels.shape == (TOP + 4 * STRIDE, 4 + 5 * STRIDE, 3)  # 5 of 7 images: 4 chosen ones, 4 neighbours each


def test_a_disk_that_refuses_is_said_once(
    make_inputs: MakeInputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    evaluator = PicturesEvaluator()
    with caplog.at_level(logging.INFO, logger="dino"):
        for step in (10, 20):
            assert evaluator.evaluate(make_inputs(limit_samples=10, step=step)) == {}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith("pictures of the evaluation are left out: ")


@pytest.mark.parametrize("key", ["every_epochs", "num_images"])
def test_options_out_of_range_are_refused_by_their_key(key: str) -> None:
    with pytest.raises(ValueError, match=rf"evaluation\.pictures\.{key}=0"):
        PicturesEvaluator(**{key: 0})
