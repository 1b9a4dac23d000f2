"""The loss on held-out images: exact, comparable over time, and without a trace in the run."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dino.augmentation import MultiCrop, ViewBatch
from dino.dataset import ImageDataset, spread_indices
from dino.evaluation import EvaluationInputs, ValidationLossEvaluator, evaluation_mode
from dino.loss import DINOLoss, EMACentering

MakeInputs = Callable[..., EvaluationInputs]
MakeDataset = Callable[..., ImageDataset]


def expected_loss(inputs: EvaluationInputs, num_images: int) -> dict[str, float]:
    """`num_images` held-out images as one single batch."""
    splits = inputs.dataset.evaluation()
    assert splits is not None
    indices = spread_indices(len(splits[1]), num_images)
    views = inputs.augmentation.photometric(inputs.augmentation(splits[1], indices, seed=inputs.seed, epoch=0))
    return loss_of(inputs, views)


def loss_of(inputs: EvaluationInputs, views: ViewBatch) -> dict[str, float]:
    with torch.no_grad(), evaluation_mode(inputs.model):
        teacher = inputs.model.teacher_forward(views.global_views)
        student, features = inputs.model.student_forward(views.global_views, views.local_views)
        terms = inputs.loss(student, teacher, 2, inputs.teacher_temp, features)
    values = {"val/loss": terms.total, "val/loss_global": terms.global_term, "val/loss_local": terms.local_term}
    return {name: value.item() for name, value in values.items() if value is not None}


@pytest.mark.parametrize("num_images", [64, 65, 100, 150])
def test_batches_of_64_average_to_the_loss_of_all_images(make_inputs: MakeInputs, num_images: int) -> None:
    """65 images are a batch of 64 and a batch of 1, which must weigh a 64th of the other."""
    inputs = make_inputs()
    found = ValidationLossEvaluator(max_samples=num_images).evaluate(inputs)
    assert found == pytest.approx(expected_loss(inputs, num_images), rel=1e-5)
    assert found.keys() == {"val/loss", "val/loss_global", "val/loss_local"}


def test_the_value_depends_on_network_and_seed_and_not_on_the_occasion(make_inputs: MakeInputs) -> None:
    evaluator = ValidationLossEvaluator(max_samples=70)
    inputs = make_inputs()
    first = evaluator.evaluate(inputs)
    torch.rand(100)  # whatever the run draws in between
    assert evaluator.evaluate(inputs) == first
    assert evaluator.evaluate(make_inputs(seed=6)) != first
    changed = make_inputs()
    with torch.no_grad():
        changed.model.student.head.last_layer.weight_v[0].mul_(-1)
    assert evaluator.evaluate(changed) != first


def test_center_and_temperature_of_the_run_are_used(make_inputs: MakeInputs) -> None:
    evaluator = ValidationLossEvaluator(max_samples=20)
    inputs = make_inputs()
    first = evaluator.evaluate(inputs)
    assert evaluator.evaluate(make_inputs(teacher_temp=0.02)) != first
    inputs.loss.centering.center.mul_(-3)
    assert evaluator.evaluate(inputs) != first


@pytest.mark.parametrize("weighting", ["pairs", "adaptive"])
def test_nothing_of_the_run_is_changed(make_inputs: MakeInputs, weighting: str) -> None:
    loss = DINOLoss(EMACentering(out_dim=32, init="first_batch"), weighting=weighting, koleo_weight=0.1)
    inputs = make_inputs(loss=loss)
    teacher_logits = torch.randn(4, 32)
    terms = loss(torch.randn(8, 32, requires_grad=True), teacher_logits, 2, 0.05, torch.randn(8, 16))
    loss.observe(terms)  # as in the middle of an accumulated step
    inputs.model.teacher.head.eval()
    modes = [part.training for part in [*inputs.model.modules(), *loss.modules()]]
    state = copy.deepcopy(inputs.model.state_dict() | loss.state_dict())
    rng = torch.get_rng_state()
    ValidationLossEvaluator(max_samples=70).evaluate(inputs)
    assert [part.training for part in [*inputs.model.modules(), *loss.modules()]] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    for name, value in (inputs.model.state_dict() | loss.state_dict()).items():
        assert torch.equal(value, state[name]), name
    loss.update(0.5)  # what was observed before the evaluation is still all there is
    torch.testing.assert_close(loss.centering.center, teacher_logits.mean(dim=0, keepdim=True))


def test_without_local_views_there_is_no_local_loss(
    make_inputs: MakeInputs, make_augmentation: Callable[..., MultiCrop]
) -> None:
    inputs = make_inputs(augmentation=make_augmentation(num_local_views=0))
    found = ValidationLossEvaluator(max_samples=10).evaluate(inputs)
    assert found.keys() == {"val/loss", "val/loss_global"}
    assert found["val/loss"] == pytest.approx(found["val/loss_global"])


def test_workers_and_the_place_of_the_photometric_part_do_not_change_the_value(
    make_inputs: MakeInputs, make_digits: MakeDataset, make_augmentation: Callable[..., MultiCrop]
) -> None:
    evaluator = ValidationLossEvaluator(max_samples=70)
    expected = evaluator.evaluate(make_inputs())
    assert evaluator.evaluate(make_inputs(dataset=make_digits(num_workers=2))) == expected
    on_cpu = make_augmentation(photometric_device="cpu")
    inputs = make_inputs(dataset=make_digits(num_workers=2), augmentation=on_cpu)
    assert evaluator.evaluate(inputs) == pytest.approx(expected, rel=1e-4)


def test_both_limits_hold_and_no_labels_are_needed(make_inputs: MakeInputs, make_noise: MakeDataset) -> None:
    evaluator = ValidationLossEvaluator(max_samples=9)
    for limit, num_images in ((5, 5), (12, 9)):
        inputs = make_inputs(dataset=make_noise(labelled=False), limit_samples=limit)
        assert evaluator.evaluate(inputs) == pytest.approx(expected_loss(inputs, num_images), rel=1e-5)


def test_without_held_out_images_there_is_one_line_and_no_metric(
    make_inputs: MakeInputs, make_noise: MakeDataset, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = make_inputs(dataset=make_noise(has_held_out=False))
    evaluator = ValidationLossEvaluator()
    with caplog.at_level(logging.INFO, logger="dino"):
        assert evaluator.evaluate(inputs) == {}
        assert evaluator.evaluate(inputs) == {}
    assert [record.message for record in caplog.records] == ["no validation loss: dataset noise has no held-out split"]


def test_unreadable_files_are_named_and_left_out(
    make_inputs: MakeInputs, make_folder: Callable[[], ImageDataset], caplog: pytest.LogCaptureFixture
) -> None:
    """The average is over the images that could be read: the same as if the broken one did not exist."""
    inputs = make_inputs(dataset=make_folder())
    splits = inputs.dataset.evaluation()
    assert splits is not None
    expected = expected_loss(inputs, 7)
    broken = Path(splits[1].name(6))
    broken.write_bytes(broken.read_bytes()[:20])
    with caplog.at_level(logging.INFO, logger="dino"):
        found = [ValidationLossEvaluator().evaluate(inputs) for _ in range(2)]
    assert found[0] == found[1] != pytest.approx(expected, rel=1e-3)
    indices = np.arange(6)
    views = inputs.augmentation.photometric(inputs.augmentation(splits[1], indices, seed=5, epoch=0))
    assert found[0] == pytest.approx(loss_of(inputs, views), rel=1e-5)
    assert caplog.text.count(broken.name) == 2  # once for each of the two evaluators


@pytest.mark.parametrize("key", ["every_epochs", "max_samples"])
def test_options_out_of_range_are_refused_by_their_key(key: str) -> None:
    with pytest.raises(ValueError, match=rf"evaluation\.validation_loss\.{key}=0"):
        ValidationLossEvaluator(**{key: 0})
