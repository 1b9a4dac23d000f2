"""Label-free quality: against known answers, against the teacher's own features, and without a trace in the run."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dino.dataset import ImageDataset, spread_indices
from dino.evaluation import EvaluationInputs, LabelFreeEvaluator, effective_rank, normalized
from dino.evaluation.label_free import feature_std, retrieval_top1

MakeInputs = Callable[..., EvaluationInputs]
MakeDataset = Callable[..., ImageDataset]
RunRanks = Callable[..., list[Any]]


@pytest.mark.parametrize(
    ("spectrum", "expected"),
    [
        ([1.0] * 8, 8.0),  # all directions alike
        ([5.0, 0.0, 0.0, 0.0], 1.0),  # one direction
        ([3.0, 3.0, 3.0, 0.0, 0.0], 3.0),  # a dimensional collapse
        ([0.5, 0.25, 0.125, 0.125], 2**1.75),  # an entropy of 1.75 bits
        ([0.0, 0.0, 0.0], 1.0),
    ],
)
def test_known_singular_values_give_the_exponential_of_their_entropy(spectrum: list[float], expected: float) -> None:
    torch.manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(40, len(spectrum), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), dtype=torch.float64))
    features = left * torch.tensor(spectrum) @ right
    assert effective_rank(features) == pytest.approx(expected, rel=1e-6)
    assert effective_rank(features.T) == pytest.approx(expected, rel=1e-6)
    assert effective_rank(100 * features) == pytest.approx(expected, rel=1e-6)


def test_features_are_neither_centered_nor_normalised() -> None:
    """A common offset is a direction of its own, and a long row weighs more than a short one."""
    features = torch.eye(4)
    assert effective_rank(features + 100) < 1.2
    assert effective_rank(features * torch.tensor([[100.0], [1.0], [1.0], [1.0]])) < 1.2


def test_it_is_the_rank_of_the_teachers_held_out_features(make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    with torch.no_grad():
        for parameter in inputs.model.student.parameters():
            parameter.zero_()  # whoever looked at the student would see one point
    splits = inputs.dataset.evaluation()
    assert splits is not None
    assert splits[1].images is not None
    for limits, num_images in (((2048, None), 360), ((100, None), 100), ((100, 9), 9), ((10, 70), 10)):
        inputs = make_inputs(model=inputs.model, limit_samples=limits[1])
        images = splits[1].images[torch.from_numpy(spread_indices(360, num_images))]
        with torch.no_grad():
            network = inputs.model.teacher.backbone.eval()
            features = network(normalized(images, [0.3], [0.37])).double().numpy()
        values = np.linalg.svd(features, compute_uv=False)
        shares = values / values.sum()
        expected = math.exp(-sum(share * math.log(share) for share in shares))
        found = LabelFreeEvaluator(max_samples=limits[0]).evaluate(inputs)
        attainable = min(num_images, 16)
        assert found["val/effective_rank"] == pytest.approx(expected, rel=1e-4)
        assert found["val/effective_rank_ratio"] == pytest.approx(expected / attainable, rel=1e-4)
        assert 1 < found["val/effective_rank"] < attainable
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        assert found["val/feature_std"] == pytest.approx(4 * np.mean([column.std() for column in unit.T]), rel=1e-3)
        assert 0 < found["val/feature_std"] < 1


@pytest.mark.parametrize("num_images", [150, 70, 5])
def test_each_first_view_looks_for_the_second_view_of_its_image(make_inputs: MakeInputs, num_images: int) -> None:
    """Slowly: one cosine at a time, the local views drawn with the global ones."""
    inputs = make_inputs()
    splits = inputs.dataset.evaluation()
    assert splits is not None
    drawn = inputs.augmentation(splits[1], spread_indices(360, num_images), seed=5, epoch=0)
    views = inputs.augmentation.photometric(drawn).global_views
    with torch.no_grad():
        backbone = inputs.model.teacher.backbone.eval()
        first, second = (backbone(view).double().numpy() for view in views)
    backbone.train()
    hits = 0
    for number, query in enumerate(first):
        cosines = [query @ row / np.linalg.norm(query) / np.linalg.norm(row) for row in second]
        hits += int(np.argmax(cosines)) == number
    found = LabelFreeEvaluator(max_samples=num_images).evaluate(inputs)["val/view_retrieval_top1"]
    assert found == pytest.approx(100 * hits / num_images)
    assert 100 / num_images < found < 100


def test_views_of_an_image_find_each_other_where_the_features_tell_images_apart() -> None:
    features = torch.randn(1100, 8, generator=torch.Generator().manual_seed(0))  # more than a chunk of queries
    assert retrieval_top1(features, 3 * features, torch.device("cpu")) == 100
    assert retrieval_top1(features, features.roll(1, dims=0), torch.device("cpu")) == 0
    with pytest.raises(ValueError, match="not finite"):
        retrieval_top1(features, torch.full_like(features, torch.nan), torch.device("cpu"))


def test_known_features_have_a_known_std() -> None:
    assert feature_std(torch.cat([torch.eye(4), -torch.eye(4)])) == pytest.approx(1)  # even over the sphere
    assert feature_std(torch.tensor([[1.0, 2.0], [10.0, 20.0]])) == pytest.approx(0)  # one direction
    assert feature_std(torch.ones(1, 3)) == 0
    uniform = torch.randn(5000, 16, generator=torch.Generator().manual_seed(0))
    assert feature_std(uniform) == pytest.approx(1, abs=0.01)


def test_a_collapsed_teacher_has_rank_one_no_spread_and_retrieves_by_chance(make_inputs: MakeInputs) -> None:
    class Constant(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.arange(16.0).expand(len(images), 16)

    inputs = make_inputs(limit_samples=100, backbone=Constant())
    found = LabelFreeEvaluator().evaluate(inputs)
    assert found == pytest.approx(
        {
            "val/effective_rank": 1.0,
            "val/effective_rank_ratio": 1 / 16,
            "val/feature_std": 0.0,
            "val/view_retrieval_top1": 1.0,  # chance, of 100 images
        },
        rel=1e-4,
        abs=1e-9,
    )


def test_features_that_are_not_finite_are_refused(make_inputs: MakeInputs) -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    backbone(torch.zeros(1, 1, 16, 16))
    nn.init.constant_(backbone[1].weight, math.inf)
    inputs = make_inputs(limit_samples=10, backbone=backbone)
    with pytest.raises(ValueError, match="not finite"):
        LabelFreeEvaluator().evaluate(inputs)


def test_labels_are_not_needed_and_without_held_out_images_it_takes_those_of_training(
    make_inputs: MakeInputs, make_noise: MakeDataset, caplog: pytest.LogCaptureFixture
) -> None:
    assert LabelFreeEvaluator().evaluate(make_inputs(dataset=make_noise(labelled=False)))
    inputs = make_inputs(dataset=make_noise(labelled=False, has_held_out=False))
    evaluator = LabelFreeEvaluator()
    with caplog.at_level(logging.INFO, logger="dino"):
        found = evaluator.evaluate(inputs)
        assert evaluator.evaluate(inputs) == found
    assert [record.message for record in caplog.records] == [
        "label-free quality of training images: dataset noise has no held-out split"
    ]
    images = inputs.dataset.train().images
    assert images is not None
    with torch.no_grad():
        features = inputs.model.teacher.backbone.eval()(normalized(images, [0.3], [0.37]))
    assert found["val/effective_rank"] == pytest.approx(effective_rank(features), rel=1e-4)


def test_nothing_of_the_run_is_changed(make_inputs: MakeInputs) -> None:
    inputs = make_inputs(limit_samples=100)
    inputs.model.student.backbone.eval()  # an unusual mode, to see that it is not simply set to training
    modes = [part.training for part in inputs.model.modules()]
    state = {name: value.clone() for name, value in inputs.model.state_dict().items()}
    rng = torch.get_rng_state()
    LabelFreeEvaluator().evaluate(inputs)
    assert [part.training for part in inputs.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    for name, value in inputs.model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_workers_do_not_change_the_values(make_inputs: MakeInputs, make_digits: MakeDataset) -> None:
    evaluator = LabelFreeEvaluator(max_samples=150)
    expected = evaluator.evaluate(make_inputs())
    assert evaluator.evaluate(make_inputs(dataset=make_digits(num_workers=2))) == expected


@pytest.mark.parametrize(("world_size", "limit"), [(2, None), (3, 70), (3, 1)])
def test_several_ranks_find_what_one_does(
    make_inputs: MakeInputs, run_ranks: RunRanks, world_size: int, limit: int | None
) -> None:
    inputs = make_inputs(limit_samples=limit)
    evaluator = LabelFreeEvaluator()
    assert run_ranks(evaluator.evaluate, world_size, inputs) == [evaluator.evaluate(inputs)] * world_size


def test_a_broken_file_is_left_out(
    make_inputs: MakeInputs, make_folder: Callable[[], ImageDataset], caplog: pytest.LogCaptureFixture
) -> None:
    inputs = make_inputs(dataset=make_folder())
    splits = inputs.dataset.evaluation()
    assert splits is not None
    before = LabelFreeEvaluator().evaluate(inputs)
    Path(splits[1].name(0)).write_bytes(b"not an image")
    found = LabelFreeEvaluator().evaluate(inputs)
    assert found != before
    assert found["val/effective_rank"] / found["val/effective_rank_ratio"] == pytest.approx(6)  # of 7 images
    assert splits[1].name(0) in caplog.text


@pytest.mark.parametrize("key", ["every_epochs", "max_samples"])
def test_options_out_of_range_are_refused_by_their_key(key: str) -> None:
    with pytest.raises(ValueError, match=rf"evaluation\.label_free\.{key}=0"):
        LabelFreeEvaluator(**{key: 0})
