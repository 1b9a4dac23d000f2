"""k-NN during training: on real digits, with real parts."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dino.dataset import ImageDataset
from dino.evaluation import EvaluationInputs, KNNEvaluator, extract_features, knn_classify
from dino.evaluation.splits import evaluation_loader

MakeInputs = Callable[..., EvaluationInputs]
MakeDataset = Callable[..., ImageDataset]


def test_raw_pixels_of_the_digits_reach_97_percent(make_inputs: MakeInputs) -> None:
    metrics = KNNEvaluator().evaluate(make_inputs(untrained=True))
    assert metrics.keys() == {"val/knn_top1", "val/knn_top5", "val/knn_top1_pixels"}
    assert metrics["val/knn_top1_pixels"] >= 97.0
    assert 20 < metrics["val/knn_top1"] < metrics["val/knn_top1_pixels"]
    assert metrics["val/knn_top1"] <= metrics["val/knn_top5"] <= 100


def test_it_is_the_k_nn_of_the_teachers_features(make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    with torch.no_grad():
        for parameter in inputs.model.student.parameters():
            parameter.zero_()  # whoever looked at the student would see one point
    splits = inputs.dataset.evaluation()
    assert splits is not None
    parts: list[Any] = []
    for source in splits:
        loader = evaluation_loader(source, inputs.dataset)
        parts += extract_features(inputs.model.teacher.backbone, loader, inputs.device, mean=[0.3], std=[0.37])
    expected = knn_classify(*parts, 10, [5, 20], 0.1)
    assert KNNEvaluator(neighbours=[5, 20], temperature=0.1).evaluate(inputs) == {
        "val/knn_top1": expected[5].top1,
        "val/knn_top5": expected[5].top5,
        "val/knn_top1_k20": expected[20].top1,
        "val/knn_top5_k20": expected[20].top5,
    }


def test_the_pixels_come_at_step_0_only_and_can_be_left_out(make_inputs: MakeInputs) -> None:
    assert "val/knn_top1_pixels" not in KNNEvaluator().evaluate(make_inputs(limit_samples=50))
    silent = KNNEvaluator(pixel_baseline=False).evaluate(make_inputs(limit_samples=50, untrained=True))
    assert "val/knn_top1_pixels" not in silent


def test_nothing_of_the_run_is_changed(make_inputs: MakeInputs) -> None:
    inputs = make_inputs(limit_samples=100, untrained=True)
    inputs.model.student.backbone.eval()  # an unusual mode, to see that it is not simply set to training
    modes = [part.training for part in inputs.model.modules()]
    state = {name: value.clone() for name, value in (inputs.model.state_dict() | inputs.loss.state_dict()).items()}
    rng = torch.get_rng_state()
    KNNEvaluator().evaluate(inputs)
    assert [part.training for part in inputs.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    for name, value in (inputs.model.state_dict() | inputs.loss.state_dict()).items():
        assert torch.equal(value, state[name]), name


def test_limits_cap_both_splits_and_the_bank(make_inputs: MakeInputs) -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.seen += len(images)
            return images.flatten(1)

    for limit, max_bank, expected in ((None, None, 1437 + 360), (50, None, 100), (50, 30, 80), (None, 30, 390)):
        counting = Counting()
        inputs = make_inputs(limit_samples=limit, backbone=counting)
        KNNEvaluator(max_bank=max_bank, neighbours=[5]).evaluate(inputs)
        assert counting.seen == expected


def test_a_network_in_half_precision_is_evaluated_as_it_trains(make_inputs: MakeInputs) -> None:
    metrics = KNNEvaluator().evaluate(make_inputs(autocast=lambda: torch.autocast("cpu", torch.bfloat16)))
    assert metrics["val/knn_top1"] == pytest.approx(KNNEvaluator().evaluate(make_inputs())["val/knn_top1"], abs=5)


@pytest.mark.parametrize(
    ("change", "reason"), [({"labelled": False}, "no labels"), ({"has_held_out": False}, "no held-out split")]
)
def test_what_the_data_cannot_tell_is_left_out_with_one_line(
    make_inputs: MakeInputs,
    make_noise: MakeDataset,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, bool],
    reason: str,
) -> None:
    inputs = make_inputs(dataset=make_noise(**change))
    evaluator = KNNEvaluator()
    with caplog.at_level(logging.INFO, logger="dino"):
        assert evaluator.evaluate(inputs) == {}
        assert evaluator.evaluate(inputs) == {}
    assert [record.message for record in caplog.records] == [f"no k-NN: dataset noise has {reason}"]


def test_files_are_read_by_workers_and_a_broken_one_is_left_out(
    make_inputs: MakeInputs, make_folder: Callable[[], ImageDataset], caplog: pytest.LogCaptureFixture
) -> None:
    inputs = make_inputs(dataset=make_folder(), untrained=True)
    evaluator = KNNEvaluator(neighbours=[3])
    expected = evaluator.evaluate(inputs)
    inputs.dataset.num_workers = 2
    assert evaluator.evaluate(inputs) == expected
    splits = inputs.dataset.evaluation()
    assert splits is not None
    Path(splits[1].name(0)).write_bytes(b"not an image")
    found = evaluator.evaluate(inputs)
    assert all(value * 6 / 100 == pytest.approx(round(value * 6 / 100)) for value in found.values())  # 6 of 7 are left
    assert splits[1].name(0) in caplog.text


def test_pixels_that_would_not_fit_are_sampled(
    make_inputs: MakeInputs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dino.evaluation.knn_evaluator.MAX_PIXEL_VALUES", 400 * 16 * 16)
    with caplog.at_level(logging.INFO, logger="dino"):
        metrics = KNNEvaluator().evaluate(make_inputs(untrained=True))
    assert 85 < metrics["val/knn_top1_pixels"] < 97.5
    assert "400 images of each split" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_epochs": 0}, r"evaluation\.knn\.every_epochs=0"),
        ({"neighbours": []}, r"evaluation\.knn\.neighbours=\[\]"),
        ({"neighbours": [0]}, r"evaluation\.knn\.neighbours=\[0\]"),
        ({"neighbours": [20, 20]}, r"evaluation\.knn\.neighbours=\[20, 20\]"),
        ({"temperature": 0.0}, r"evaluation\.knn\.temperature=0\.0"),
        ({"max_bank": 0}, r"evaluation\.knn\.max_bank=0"),
    ],
)
def test_options_out_of_range_are_refused_by_their_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KNNEvaluator(**options)
