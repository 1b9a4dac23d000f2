"""Masks carried through videos: against the formula written out, with scores that are known."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from dino.backbone import Backbone
from dino.evaluation import EvaluationInputs
from dino.evaluation.mask_propagation import Propagation, to_pixels
from dino.evaluation.segmentation_scores import contour_fit, region_overlap, sequence_scores
from dino.evaluation.video_segmentation import VideoSegmentationEvaluator, found_videos, read_masks

MakeInputs = Callable[..., EvaluationInputs]


# ---------------------------------------------------------------------- propagation


def plain_propagation(frames: list[Tensor], first: Tensor, num_last: int, radius: int, top_k: int) -> list[Tensor]:
    """Patch by patch."""
    height, width, _ = frames[0].shape
    known: list[tuple[Tensor, Tensor]] = [(frames[0], first)]
    found = []
    for frame in frames[1:]:
        sources = [known[0], *known[1:][-num_last:]] if num_last else known[:1]
        labels = torch.zeros_like(first)
        for row in range(height):
            for column in range(width):
                pairs = []
                for features, soft in sources:
                    for r in range(height):
                        for c in range(width):
                            if radius and (abs(r - row) > radius or abs(c - column) > radius):
                                continue
                            cosine = torch.cosine_similarity(frame[row, column], features[r, c], dim=0)
                            pairs.append((math.exp(float(cosine) / 0.1), soft[:, r, c]))
                best = sorted(pairs, key=lambda pair: -pair[0])[:top_k]
                total = sum(weight for weight, _ in best)
                labels[:, row, column] = sum((weight / total) * soft for weight, soft in best)
        known.append((frame, labels))
        found.append(labels)
    return found


@pytest.mark.parametrize(("num_last", "radius"), [(2, 1), (0, 1), (2, 0)])
def test_labels_travel_as_the_formula_says(num_last: int, radius: int) -> None:
    generator = torch.Generator().manual_seed(0)
    frames = [torch.randn(3, 4, 8, generator=generator, dtype=torch.float64) for _ in range(5)]
    first = torch.nn.functional.one_hot(torch.arange(12).view(3, 4) % 3, 3).permute(2, 0, 1).double()
    propagation = Propagation(num_last_frames=num_last, radius=radius, top_k=3)
    found = list(propagation(frames, first))
    for ours, plain in zip(found, plain_propagation(frames, first, num_last, radius, 3), strict=True):
        assert_close(ours, plain, rtol=1e-6, atol=1e-8)
        assert_close(ours.sum(dim=0), torch.ones(3, 4, dtype=torch.float64))


def test_an_object_that_moves_is_followed() -> None:
    """Every patch has features of its own; the picture shifts by a patch a frame."""
    scene = torch.randn(6, 8, 16, generator=torch.Generator().manual_seed(0))
    first = torch.zeros(2, 6, 8)
    first[1, 2:4, 1:3] = 1
    first[0] = 1 - first[1]
    frames = [scene.roll(shift, dims=1) for shift in range(4)]
    for shift, labels in enumerate(Propagation(top_k=1)(frames, first), start=1):
        assert_close(labels, first.roll(shift, dims=2))


def test_pixels_get_the_label_that_leads_after_stretching() -> None:
    labels = torch.zeros(2, 2, 3)
    labels[0] = 0.9
    labels[1, :, 2] = 0.4  # faint everywhere, and yet the strongest that label 1 gets
    labels[0, :, 2] = 0.6
    pixels = to_pixels(labels, (8, 12), patch_size=4)
    assert pixels.shape == (8, 12)
    assert set(pixels[:, 11].tolist()) == {1}
    assert set(pixels[:, 0].tolist()) == {0}


# ---------------------------------------------------------------------- scores


def square(top: int, left: int, side: int = 20) -> NDArray[np.bool_]:
    mask = np.zeros((60, 80), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_regions_and_contours_of_masks_that_can_be_counted() -> None:
    nothing = np.zeros((60, 80), bool)
    assert region_overlap(square(10, 10), square(10, 10)) == contour_fit(square(10, 10), square(10, 10)) == 1
    assert region_overlap(square(10, 10), square(10, 20)) == pytest.approx(10 * 20 / (30 * 20))
    assert region_overlap(square(5, 5), square(35, 55)) == contour_fit(square(5, 5), square(35, 55)) == 0
    assert region_overlap(nothing, nothing) == contour_fit(nothing, nothing) == 1
    assert region_overlap(square(5, 5), nothing) == contour_fit(nothing, square(5, 5)) == 0
    # The tolerance at 60 x 80 is one pixel: a shift by one is free for contours, not for regions.
    assert contour_fit(square(10, 11), square(10, 10)) == 1
    assert region_overlap(square(10, 11), square(10, 10)) == pytest.approx(19 / 21)
    assert contour_fit(square(10, 14), square(10, 10)) < 0.7


def test_scores_leave_out_the_first_and_the_last_frame() -> None:
    truth = np.stack([square(10, 10)] * 4).astype(np.uint8)
    predicted = truth.copy()
    predicted[0] = predicted[3] = 0
    assert sequence_scores(predicted, truth) == [{"object": 1, "j": 1.0, "f": 1.0, "j_recall": 1.0, "f_recall": 1.0}]
    predicted[1] = 0
    assert sequence_scores(predicted, truth)[0]["j"] == 0.5


# ---------------------------------------------------------------------- videos


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    """One video of 5 gray frames in the layout of DAVIS: two bright objects, one of which moves."""
    root, draw = tmp_path / "davis", np.random.default_rng(0)
    background = draw.integers(0, 60, (64, 128), dtype=np.uint8)
    for place in range(5):
        labels = np.zeros((64, 128), np.uint8)
        labels[16:32, 16 + 4 * place : 40 + 4 * place] = 1
        labels[40:56, 80:112] = 2
        frame = np.where(labels == 1, 250, np.where(labels == 2, 150, background)).astype(np.uint8)
        for kind, picture, ending in (("JPEGImages", frame, "jpg"), ("Annotations", labels, "png")):
            folder = root / kind / "480p" / "two"
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(picture)
            if ending == "png":
                image = image.convert("P")
                image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
            image.save(folder / f"{place:05d}.{ending}")
    return root


def test_a_video_is_segmented_end_to_end(davis: Path, make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    evaluator = VideoSegmentationEvaluator(root=str(davis), short_side=64)
    metrics = evaluator.evaluate(inputs)
    assert set(metrics) == {"val/segmentation_jf", "val/segmentation_j", "val/segmentation_f"}
    assert 40 < metrics["val/segmentation_j"] <= 100  # bright objects: even an untrained network tells them apart
    assert metrics["val/segmentation_jf"] == pytest.approx(
        (metrics["val/segmentation_j"] + metrics["val/segmentation_f"]) / 2
    )
    assert metrics == evaluator.evaluate(inputs)
    assert inputs.folder is not None
    scores = json.loads((inputs.folder / "segmentation.json").read_text())["objects"]
    assert [(score["video"], score["object"]) for score in scores] == [("two", 1), ("two", 2)]
    with Image.open(inputs.folder / "segmentation" / "two" / "00003.png") as mask:
        assert mask.mode == "P"
        assert mask.size == (128, 64)
        assert mask.getpalette()[3:9] == [200, 0, 0, 0, 200, 0]
        assert set(np.unique(np.array(mask)).tolist()) <= {0, 1, 2}


def test_ranks_share_the_videos(davis: Path, make_inputs: MakeInputs, run_ranks: Callable[..., list[Any]]) -> None:
    for kind in ("JPEGImages", "Annotations"):
        shutil.copytree(davis / kind / "480p" / "two", davis / kind / "480p" / "three")
    inputs = make_inputs()
    evaluator = VideoSegmentationEvaluator(root=str(davis), short_side=64)
    expected = evaluator.evaluate(inputs)
    assert run_ranks(evaluator.evaluate, 3, inputs) == [expected] * 3  # one rank has no video


def test_a_disk_that_refuses_costs_the_masks_alone(
    davis: Path, make_inputs: MakeInputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    inputs = make_inputs(folder=tmp_path / "file" / "evaluation")
    metrics = VideoSegmentationEvaluator(root=str(davis), short_side=64).evaluate(inputs)
    assert metrics["val/segmentation_j"] > 40
    assert "segmentation/two is left out: Not a directory" in caplog.text


def test_black_and_white_masks_are_one_object(tmp_path: Path) -> None:
    Image.fromarray((square(10, 10) * 255).astype(np.uint8)).save(tmp_path / "0.png")
    labels, _ = read_masks([tmp_path / "0.png"])
    assert np.unique(labels).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda root: (root / "Annotations").rename(root / "masks"), "has no Annotations/<resolution>/<video>"),
        (lambda root: (root / "JPEGImages" / "480p" / "two").rename(root / "elsewhere"), "there is no .*two"),
        (
            lambda root: [each.unlink() for each in sorted((root / "Annotations").rglob("*.png"))[2:]],
            "fewer than 3 masks",
        ),
        (lambda root: (root / "JPEGImages/480p/two/00002.jpg").write_bytes(b""), "00002.jpg cannot be read"),
    ],
)
def test_a_folder_of_another_layout_is_named(
    davis: Path, make_inputs: MakeInputs, break_it: Callable[[Path], Any], says: str
) -> None:
    break_it(davis)
    with pytest.raises(ValueError, match=says):
        VideoSegmentationEvaluator(root=str(davis), short_side=64).evaluate(make_inputs())


def test_the_folder_must_be_named(make_inputs: MakeInputs) -> None:
    with pytest.raises(ValueError, match=r"evaluation.video_segmentation.root is missing"):
        VideoSegmentationEvaluator().evaluate(make_inputs())


# ---------------------------------------------------------------------- real videos


def test_masks_that_are_the_truth_are_perfect(shared_data: Callable[[str], Path]) -> None:
    videos = found_videos(shared_data("davis_mini"))
    assert len(videos) == 2
    for _, masks in videos:
        truth, _ = read_masks(sorted(masks.glob("*.png")))
        scores = sequence_scores(truth, truth)
        assert scores
        assert all(score["j"] == score["f"] == score["j_recall"] == score["f_recall"] == 1.0 for score in scores)


class Knowing(Backbone):
    """Features of a patch that tell which object it is of, read from the masks in the order of the videos."""

    patch_size = 8
    embed_dim = 2

    def __init__(self, root: Path) -> None:
        super().__init__()
        masks = [mask for _, folder in found_videos(root) for mask in read_masks(sorted(folder.glob("*.png"))[:5])[0]]
        self.masks = iter(masks)

    def forward(self, *batches: Tensor) -> Tensor:
        return torch.cat([self.intermediate_layers(images, 1)[0][:, 0] for images in batches])

    def intermediate_layers(self, images: Tensor, n: int) -> list[Tensor]:
        size = (images.shape[-2] // 8, images.shape[-1] // 8)
        mask = torch.from_numpy(next(self.masks))[None, None].float()
        share = torch.nn.functional.interpolate(mask, size, mode="area").flatten()
        tokens = torch.stack([share, 1 - share], dim=-1)
        return [torch.cat([torch.zeros(1, 2), tokens])[None]]


@pytest.mark.slow
def test_real_videos_are_segmented_where_features_tell_the_object(
    shared_data: Callable[[str], Path], make_inputs: MakeInputs, make_noise: Any
) -> None:
    root = shared_data("davis_mini")
    colours = make_noise(channels=3, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    inputs = make_inputs(backbone=Knowing(root), dataset=colours)
    metrics = VideoSegmentationEvaluator(root=str(root), max_frames=5).evaluate(inputs)
    assert metrics["val/segmentation_j"] > 85  # patches of 8 pixels and what lies between them are lost
    assert metrics["val/segmentation_f"] > 85
    assert inputs.folder is not None
    assert len(list((inputs.folder / "segmentation").glob("*/*.png"))) == 10
