"""Retrieval and copy detection: metrics against scikit-learn and by hand, and both protocols end to end."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.testing import assert_close

from dino.backbone import Backbone, VisionTransformer
from dino.evaluation import CopyDetectionEvaluator, EvaluationInputs, RetrievalEvaluator, copy_detection
from dino.evaluation.copy_detection import Whitening, descriptors
from dino.evaluation.ranking import average_precision, positive_ranks, precision_at
from dino.evaluation.retrieval import read_shrunk

MakeInputs = Callable[..., EvaluationInputs]


# ---------------------------------------------------------------------- metrics


def test_average_precision_by_hand() -> None:
    assert average_precision([0], 1) == 1
    assert average_precision([1], 1) == pytest.approx((0 + 1 / 2) / 2)
    assert average_precision([0, 2], 2) == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert average_precision([2, 0], 2) == average_precision([0, 2], 2)
    assert average_precision([], 3) == 0
    assert average_precision([0], 2) == 0.5  # the other was not found


def test_trapezoids_lie_close_to_the_steps_of_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        relevant, scores = draw.random(400) < 0.2, draw.random(400) + 0.0
        scores[relevant] += 0.3
        ranks = np.flatnonzero(relevant[np.argsort(-scores)])
        steps = float(average_precision_score(relevant, scores))
        assert average_precision(ranks, int(relevant.sum())) == pytest.approx(steps, abs=0.01)


def test_ignored_images_are_as_if_they_were_not_there() -> None:
    ranking = np.array([5, 3, 8, 1, 0, 7])
    assert positive_ranks(ranking, {8, 0}, {5, 1}).tolist() == [1, 2]
    assert positive_ranks(ranking, {8, 0}).tolist() == [2, 4]
    assert positive_ranks(ranking, {5, 8}, {5}).tolist() == [1]


def test_precision_looks_no_further_than_the_last_positive() -> None:
    assert precision_at([0, 1, 7], 5) == pytest.approx(2 / 5)
    assert precision_at([0, 2], 10) == pytest.approx(2 / 3)
    assert precision_at([4], 1) == 0


# ---------------------------------------------------------------------- retrieval


def picture(kind: int, seed: int) -> Image.Image:
    """Kinds differ in brightness and in where the edge is."""
    pixels = np.random.default_rng(seed).integers(0, 12, (40, 40), dtype=np.uint8)
    pixels[:, 8 * (kind + 1) :] += 60 * (kind + 1)
    return Image.fromarray(pixels)


@pytest.fixture
def oxford(tmp_path: Path) -> Path:
    """Nine images of three kinds, three queries with a box, in the layout of the benchmark."""
    root = tmp_path / "roxford"
    (root / "jpg").mkdir(parents=True)
    names = [f"image_{place}" for place in range(9)]
    for place, name in enumerate(names):
        picture(place % 3, place).save(root / "jpg" / f"{name}.jpg", quality=95)
    for kind in range(3):
        picture(kind, 100 + kind).save(root / "jpg" / f"query_{kind}.jpg", quality=95)
    truth = [
        {
            "bbx": [0.0, 0.0, 40.0, 40.0],
            "easy": np.array([kind]),
            "hard": np.array([kind + 3]),
            "junk": np.array([kind + 6]),
        }
        for kind in range(3)
    ]
    content = {"imlist": names, "qimlist": [f"query_{kind}" for kind in range(3)], "gnd": truth}
    (root / "gnd_roxford.pkl").write_bytes(pickle.dumps(content))
    return root


def test_images_of_a_kind_are_found(oxford: Path, make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    for multi_scale in (False, True):
        metrics = RetrievalEvaluator(root=str(oxford), image_size=32, multi_scale=multi_scale).evaluate(inputs)
        assert metrics["val/retrieval_medium_map"] == metrics["val/retrieval_hard_map"] == 100
        assert set(metrics) == {
            f"val/retrieval_{protocol}_{name}"
            for protocol in ("medium", "hard")
            for name in ("map", "mp1", "mp5", "mp10")
        }


def test_ranks_share_the_images(
    oxford: Path, copydays: Path, make_inputs: MakeInputs, run_ranks: Callable[..., list[Any]]
) -> None:
    inputs = make_inputs()
    evaluators = [
        RetrievalEvaluator(root=str(oxford), image_size=32),
        CopyDetectionEvaluator(root=str(copydays), image_size=32, whitening=str(copydays / "original")),
    ]
    for evaluator in evaluators:
        assert run_ranks(evaluator.evaluate, 3, inputs) == [evaluator.evaluate(inputs)] * 3


def test_a_ground_truth_that_is_wrong_gives_what_is_counted_by_hand(oxford: Path, make_inputs: MakeInputs) -> None:
    """The positives of query 0 are images of another kind: they come behind its own, of which one is junk."""
    path = oxford / "gnd_roxford.pkl"
    content = pickle.loads(path.read_bytes())
    content["gnd"] = [{"bbx": None, "easy": [1], "hard": [], "junk": [6]}, *content["gnd"][1:]]
    path.write_bytes(pickle.dumps(content))
    metrics = RetrievalEvaluator(root=str(oxford), image_size=32).evaluate(make_inputs())
    assert metrics["val/retrieval_hard_map"] == 100  # query 0 has no hard positive, and does not count
    rank = round(1 / (2 * (3 * metrics["val/retrieval_medium_map"] / 100 - 2))) - 1
    assert 2 <= rank <= 7


def test_boxes_and_sizes_are_applied(oxford: Path) -> None:
    file = oxford / "jpg" / "query_2.jpg"
    assert read_shrunk(file, 1, 20).shape == (1, 20, 20)
    assert read_shrunk(file, 3, 100, (0, 10, 30, 20)).shape == (3, 10, 30)
    assert (
        read_shrunk(file, 1, 100, (30, 0, 40, 40)).float().mean()
        > 150
        > 20
        > read_shrunk(file, 1, 100, (0, 0, 10, 40)).float().mean()
    )


def test_a_pickle_that_would_run_code_is_refused(oxford: Path, make_inputs: MakeInputs, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    (oxford / "gnd_roxford.pkl").write_bytes(pickle.dumps({"imlist": Evil()}))
    with pytest.raises(ValueError, match=r"is not the ground truth of the benchmark .*it wants to call"):
        RetrievalEvaluator(root=str(oxford)).evaluate(make_inputs())
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------- copy detection


@pytest.fixture
def copydays(tmp_path: Path) -> Path:
    """Five originals, and of each a JPEG of low quality and one that is another image altogether."""
    root, draw = tmp_path / "copydays", np.random.default_rng(0)
    for folder in ("original", "jpegqual/20", "strong"):
        (root / folder).mkdir(parents=True)
    scenes = [Image.fromarray(draw.integers(0, 256, (6, 6), dtype=np.uint8)).resize((60, 48), 3) for _ in range(5)]
    for place, scene in enumerate(scenes):
        scene.save(root / "original" / f"{2000 + place}00.jpg", quality=95)
        scene.save(root / "jpegqual" / "20" / f"{2000 + place}01.jpg", quality=20)
        scenes[(place + 1) % 5].save(root / "strong" / f"{2000 + place}02.jpg", quality=95)
    return root


def test_copies_find_their_originals_and_others_do_not(copydays: Path, make_inputs: MakeInputs, tmp_path: Path) -> None:
    inputs = make_inputs()
    metrics = CopyDetectionEvaluator(root=str(copydays), image_size=32).evaluate(inputs)
    assert metrics["val/copy_jpegqual_20_map"] == 100
    assert metrics["val/copy_strong_map"] <= 25  # the first is another original: at best the second is its own
    # With every original as a distractor too, the same image is found twice: its own comes first.
    with_more = CopyDetectionEvaluator(root=str(copydays), distractors=str(copydays / "original"), image_size=32)
    assert with_more.evaluate(inputs)["val/copy_jpegqual_20_map"] == 100
    whitened = CopyDetectionEvaluator(root=str(copydays), whitening=str(copydays / "original"), image_size=32)
    assert whitened.evaluate(inputs)["val/copy_jpegqual_20_map"] > 50


def test_many_tokens_are_handled_a_few_images_at_a_time(
    copydays: Path, make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention over all pairs of 32 images of 6,401 tokens would take tens of gigabytes."""
    inputs, sizes = make_inputs(), list[int]()
    of_batch = copy_detection.descriptors

    def counted(backbone: Backbone, images: Tensor) -> Tensor:
        sizes.append(len(images))
        return of_batch(backbone, images)

    monkeypatch.setattr(copy_detection, "descriptors", counted)
    whole = CopyDetectionEvaluator(root=str(copydays), image_size=32).evaluate(inputs)
    assert set(sizes) == {5}
    side = 32 // inputs.backbone.patch_size
    monkeypatch.setattr(copy_detection, "MAX_PAIRS", 2 * side**4)
    assert CopyDetectionEvaluator(root=str(copydays), image_size=32).evaluate(inputs) == whole
    assert set(sizes[3:]) == {2, 1}
    with pytest.raises(ValueError, match="image_size=1: a patch alone has"):
        CopyDetectionEvaluator(root=str(copydays), image_size=1).evaluate(inputs)


def test_descriptors_are_class_token_and_generalised_mean() -> None:
    torch.manual_seed(0)
    backbone = VisionTransformer(image_size=16, patch_size=4, embed_dim=8, depth=2, num_heads=2).eval()
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        tokens = backbone.intermediate_layers(images, 1)[0]
        found = descriptors(backbone, images)
        assert_close(found[:, :8], backbone(images))
        assert_close(found[:, 8:], (tokens[:, 1:].clamp(min=1e-6) ** 4).mean(dim=1) ** 0.25)


def test_whitened_descriptors_have_unit_variance() -> None:
    scales = torch.diag(torch.tensor([9.0, 4, 2, 1, 1, 0.1]))
    rows = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) @ scales
    rows -= rows.mean(dim=0)
    white = Whitening.fit(rows, 0.5)(rows)
    assert_close(white.T @ white / 500, torch.eye(6, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    plain = Whitening.fit(rows, 0.0)(rows)
    assert_close(plain.norm(dim=1), (rows - rows.mean(dim=0)).double().norm(dim=1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda root: (root / "original").rename(root / "originals"), "needs original/ and a folder of copies"),
        (lambda root: (root / "strong" / "200002.jpg").rename(root / "strong" / "photo.jpg"), "photo.jpg is no name"),
        (lambda root: (root / "original" / "200000.jpg").unlink(), "has no original"),
    ],
)
def test_another_layout_is_named(
    copydays: Path, make_inputs: MakeInputs, break_it: Callable[[Path], Any], says: str
) -> None:
    break_it(copydays)
    with pytest.raises(ValueError, match=says):
        CopyDetectionEvaluator(root=str(copydays), image_size=32).evaluate(make_inputs())


@pytest.mark.parametrize("evaluator", [RetrievalEvaluator, CopyDetectionEvaluator])
def test_the_folder_must_be_named(evaluator: Any, make_inputs: MakeInputs) -> None:
    with pytest.raises(ValueError, match=r"\.root is missing"):
        evaluator().evaluate(make_inputs())
