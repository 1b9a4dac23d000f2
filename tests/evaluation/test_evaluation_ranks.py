"""Evaluation over real gloo ranks is the evaluation of one process, bit for bit, and gives way to signals."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dino import preemption, ranks
from dino.dataset import EvaluationLoader, ImageDataset, SubsetSource
from dino.evaluation import (
    EvaluationInputs,
    KNNEvaluator,
    LabelFreeEvaluator,
    PicturesEvaluator,
    ValidationLossEvaluator,
    extract_features,
    knn_classify,
)
from dino.loss import DINOLoss, SinkhornKnopp

MakeInputs = Callable[..., EvaluationInputs]
RunRanks = Callable[..., list[Any]]

CPU = torch.device("cpu")


@pytest.mark.parametrize("world_size", [2, 3])
def test_k_nn_of_several_ranks_is_that_of_one(make_inputs: MakeInputs, run_ranks: RunRanks, world_size: int) -> None:
    """1437 bank images in 23 batches of 64, 360 queries in 6, one chunk of queries; the pixels too."""
    inputs = make_inputs(untrained=True)
    evaluator = KNNEvaluator(neighbours=[20, 5])
    expected = evaluator.evaluate(inputs)
    assert expected.keys() >= {"val/knn_top1", "val/knn_top5_k5", "val/knn_top1_pixels"}
    assert run_ranks(evaluator.evaluate, world_size, inputs) == [expected] * world_size


@pytest.mark.parametrize("limit", [1, 3, 70])
def test_ranks_without_an_image_take_part(make_inputs: MakeInputs, run_ranks: RunRanks, limit: int) -> None:
    inputs = make_inputs(limit_samples=limit, untrained=True)
    for evaluator in (KNNEvaluator(neighbours=[1]), ValidationLossEvaluator(), LabelFreeEvaluator()):
        assert run_ranks(evaluator.evaluate, 3, inputs) == [evaluator.evaluate(inputs)] * 3


def test_images_that_cannot_be_read_are_left_out_alike(
    make_inputs: MakeInputs, make_folder: Callable[[], ImageDataset], run_ranks: RunRanks
) -> None:
    """A whole batch of bank and of held-out images, so that a rank has images to read, and gets none."""
    dataset = make_folder()
    dataset.batch_size = 4
    inputs = make_inputs(dataset=dataset, untrained=True)
    splits = dataset.evaluation()
    assert splits is not None
    bank, held_out = splits
    broken = [bank.name(index) for index in (1, 8, 9, 10, 11)] + [held_out.name(index) for index in (4, 5, 6)]
    for name in broken:
        Path(name).write_bytes(b"not an image")
    for evaluator in (KNNEvaluator(neighbours=[2]), ValidationLossEvaluator(), LabelFreeEvaluator()):
        expected = evaluator.evaluate(inputs)
        assert expected
        assert run_ranks(evaluator.evaluate, 3, inputs) == [expected] * 3


@pytest.mark.parametrize("neighbours", [[1], [7, 30]])
@pytest.mark.parametrize("num_queries", [1, 50])
def test_queries_are_classified_once_each(run_ranks: RunRanks, neighbours: list[int], num_queries: int) -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(count, 4, generator=generator) for count in (90, num_queries))
    labels = torch.randint(0, 6, (90 + num_queries,), generator=generator)
    data = (bank, labels[:90], queries, labels[90:], 6, neighbours)
    expected = knn_classify(*data, query_chunk=8)
    found = run_ranks(lambda: knn_classify(*data, query_chunk=8), 4)
    assert found == [expected] * 4


@pytest.mark.parametrize("centering", ["ema", "sinkhorn"])
@pytest.mark.parametrize("num_images", [64, 150, 360])
def test_the_validation_loss_of_several_ranks_is_that_of_one(
    make_inputs: MakeInputs, run_ranks: RunRanks, centering: str, num_images: int
) -> None:
    """Some ranks have a batch more than others; Sinkhorn balances each batch by itself, as in one process."""
    changes = {"loss": DINOLoss(SinkhornKnopp(), student_temp=0.1)} if centering == "sinkhorn" else {}
    inputs = make_inputs(**changes)
    evaluator = ValidationLossEvaluator(max_samples=num_images)
    assert run_ranks(evaluator.evaluate, 2, inputs) == [evaluator.evaluate(inputs)] * 2


def test_features_that_are_not_finite_stop_every_rank_with_the_reason(run_ranks: RunRanks) -> None:
    """The broken query is of the last rank only."""
    bank, queries = torch.randn(20, 4), torch.randn(6, 4)
    queries[5, 0] = torch.nan
    labels = torch.zeros(26, dtype=torch.int64)

    def classify() -> bool:
        with pytest.raises(ValueError, match="not finite"):
            knn_classify(bank, labels[:20], queries, labels[20:], 2, [3], query_chunk=3)
        return True

    assert run_ranks(classify, 2) == [True, True]


def test_an_empty_split_is_an_error_on_every_rank(run_ranks: RunRanks, make_noise: Callable[..., ImageDataset]) -> None:
    def extract() -> bool:
        nothing = SubsetSource(make_noise().train(), np.empty(0, dtype=np.int64))
        loader = EvaluationLoader(nothing, size=16, resize=16, batch_size=4, num_workers=0)
        with pytest.raises(ValueError, match="no images"):
            extract_features(lambda images: images, loader, CPU, mean=[0], std=[1])
        return True

    assert run_ranks(extract, 2) == [True, True]


class SendsSignal(nn.Module):
    """Stands for the network; at the `when`-th batch the scheduler asks this process to stop."""

    def __init__(self, network: nn.Module, when: int) -> None:
        super().__init__()
        self.network = network
        self.when = when
        self.num_batches = 0

    def forward(self, images: Tensor) -> Tensor:
        self.num_batches += 1
        if self.num_batches == self.when and ranks.rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        features: Tensor = self.network(images)
        return features


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("evaluator", "when"),
    [
        (KNNEvaluator(), 2),
        (KNNEvaluator(), 12),
        (ValidationLossEvaluator(), 2),
        (LabelFreeEvaluator(), 2),
        (LabelFreeEvaluator(), 5),
        (PicturesEvaluator(), 2),
        (PicturesEvaluator(), 5),
    ],
    ids=["bank", "held_out", "loss", "rank", "views", "features", "distributions"],
)
def test_a_signal_to_one_rank_ends_the_evaluation_of_all(
    make_inputs: MakeInputs, run_ranks: RunRanks, evaluator: Any, when: int, world_size: int
) -> None:
    """At its `when`-th batch, which with two ranks is one of what the test is called."""
    inputs = make_inputs()
    inputs.model.student.backbone.eval()  # an unusual mode, to see that it comes back

    def stop() -> tuple[bool, int]:
        backbone = SendsSignal(inputs.model.teacher.backbone, when)
        inputs.model.teacher.backbone = backbone
        modes = [part.training for part in inputs.model.modules()]
        preemption.listen()
        with pytest.raises(preemption.Preempted):
            evaluator.evaluate(dataclasses.replace(inputs, backbone=backbone))
        return [part.training for part in inputs.model.modules()] == modes, backbone.num_batches

    results = run_ranks(stop, world_size)
    assert all(modes_are_back for modes_are_back, _ in results)
    assert results[0][1] <= when


def test_a_signal_during_the_search_ends_it(run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> str:
        preemption.listen()
        bank, labels = torch.randn(50, 4), torch.zeros(50, dtype=torch.int64)
        if ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        with pytest.raises(preemption.Preempted) as caught:
            knn_classify(bank, labels, bank, labels, 1, [3], bank_chunk=5, query_chunk=5)
        return str(caught.value)

    assert run_ranks(stop, 2) == ["a signal to another rank", "SIGUSR2"]
