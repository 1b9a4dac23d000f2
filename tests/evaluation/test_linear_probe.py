"""The linear probe: several learning rates at once are each what it is alone; the choice is made on training images."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from dino.backbone import ConvolutionalBackbone, VisionTransformer
from dino.evaluation import EvaluationInputs, LinearEvaluator, probe_features, train_probes

MakeInputs = Callable[..., EvaluationInputs]
FAST: dict[str, Any] = {"epochs": 40, "batch_size": 16, "learning_rates": [1.0, 100.0], "num_seeds": 2}


def clusters(num_images: int = 90, num_features: int = 6, num_classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_images) % num_classes
    centers = torch.randn(num_classes, num_features, generator=generator)
    return centers[labels] + 0.3 * torch.randn(num_images, num_features, generator=generator), labels


def plain_probe(features: Tensor, labels: Tensor, lr: float, epochs: int, batch_size: int, seed: int) -> nn.Linear:
    """eval_linear.py, one probe: SGD with momentum, a cosine over the epochs."""
    generator = torch.Generator().manual_seed(seed)
    probe = nn.Linear(features.shape[1], 3)
    with torch.no_grad():
        probe.weight.copy_(0.01 * torch.randn(probe.weight.shape, generator=generator))
        probe.bias.zero_()
    optimizer = torch.optim.SGD(probe.parameters(), lr=lr, momentum=0.9)
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        for rows in torch.randperm(len(features), generator=generator).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(probe(features[rows]), labels[rows]).backward()
            optimizer.step()
    return probe


def test_each_of_several_probes_is_what_it_is_alone() -> None:
    features, labels = clusters()
    rates = [0.003, 0.1, 1.0]
    together = train_probes(features, labels, 3, rates, epochs=5, batch_size=32, seed=4)
    for place, rate in enumerate(rates):
        alone = plain_probe(features, labels, rate, epochs=5, batch_size=32, seed=4)
        assert_close(together.weight[place], alone.weight.detach(), rtol=1e-4, atol=1e-5)
        assert_close(together.bias[place], alone.bias.detach(), rtol=1e-4, atol=1e-5)
        logits = alone(features)
        assert int(together.hits(features, labels)[place]) == int((logits.argmax(dim=1) == labels).sum())


def test_a_probe_that_diverges_is_no_hit_and_disturbs_no_other() -> None:
    features, labels = clusters()
    beside = train_probes(features, labels, 3, [0.1, 3e38], epochs=5)
    alone = train_probes(features, labels, 3, [0.1], epochs=5)
    assert not beside.weight[1].isfinite().all()
    hits = beside.hits(features, labels)
    assert hits[1] == 0
    assert hits[0] == alone.hits(features, labels)[0] > 80


def test_features_are_those_of_the_protocol() -> None:
    torch.manual_seed(0)
    backbone = VisionTransformer(image_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        layers = backbone.intermediate_layers(images, 3)
        expected = torch.cat([layers[1][:, 0], layers[2][:, 0], layers[2][:, 1:].mean(dim=1)], dim=1)
        assert torch.equal(probe_features(backbone, images, 2, average_patches=True), expected)
        assert probe_features(backbone, images, 4, average_patches=False).shape == (2, 48)  # it has three blocks
        resnet = ConvolutionalBackbone(architecture="resnet18", stem="small").eval()
        assert torch.equal(probe_features(resnet, images, 4, average_patches=True), resnet(images))


def test_the_probe_of_a_run_names_its_metrics_and_repeats(make_inputs: MakeInputs) -> None:
    inputs = make_inputs(limit_samples=300)
    first = LinearEvaluator(**FAST).evaluate(inputs)
    assert set(first) == {"val/linear_top1", "val/linear_top5", "val/linear_top1_std"}
    assert 15 < first["val/linear_top1"] < first["val/linear_top5"] <= 100  # chance is 10
    assert first == LinearEvaluator(**FAST).evaluate(inputs)
    assert first["val/linear_top1_std"] >= 0
    assert set(LinearEvaluator(**FAST, prefix="probe").evaluate(inputs)) == {
        name.replace("val", "probe") for name in first
    }


def test_the_choice_looks_at_no_held_out_image(make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out labels turned around change the accuracy, not the learning rates."""
    inputs = make_inputs(limit_samples=200)
    held_out = inputs.dataset.evaluation()
    assert held_out is not None
    chosen, accuracies = [], []
    for turned in (False, True):
        if turned:
            monkeypatch.setattr(held_out[1], "labels", 9 - held_out[1].labels)
        metrics = LinearEvaluator(**FAST).evaluate(inputs)
        accuracies.append(metrics["val/linear_top1"])
        assert inputs.folder is not None
        chosen.append((inputs.folder / "linear.json").read_text().partition("top1")[0])
    assert chosen[0] == chosen[1]
    assert accuracies[0] > accuracies[1]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"learning_rates": []}, "evaluation.linear.learning_rates="),
        ({"choice_fraction": 1.0}, "evaluation.linear.choice_fraction=1.0"),
        ({"num_last_blocks": 0}, "evaluation.linear.num_last_blocks=0"),
    ],
)
def test_settings_out_of_range_are_named(setting: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LinearEvaluator(**setting)


def test_data_without_labels_give_no_probe(make_inputs: MakeInputs, make_noise: Any) -> None:
    assert LinearEvaluator(**FAST).evaluate(make_inputs(dataset=make_noise(labelled=False))) == {}
