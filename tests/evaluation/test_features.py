"""Feature extraction: order, arithmetic, and what it leaves behind."""

import pytest
import torch
from torch import Tensor, nn

from dino.evaluation import evaluation_mode, extract_features, normalized, progress
from dino.evaluation.linear_probe import train_probes

CPU = torch.device("cpu")


class Noisy(nn.Module):
    """A network that trains on random masks and moving statistics, and remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()
        self.modes: set[bool] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.modes.add(self.training)
        features: Tensor = self.frozen(self.drop(self.norm(images))).mean(dim=(2, 3))
        return features


class Listed(list[tuple[Tensor, Tensor | None]]):
    @property
    def num_images(self) -> int:
        return sum(len(images) for images, _ in self)


def batches(sizes: list[int]) -> Listed:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (sum(sizes), 2, 4, 4), generator=generator, dtype=torch.uint8)
    return Listed(zip(images.split(sizes), torch.arange(sum(sizes)).split(sizes), strict=True))


def test_features_and_labels_keep_the_order_of_the_images() -> None:
    loader = batches([4, 4, 1])
    images = torch.cat([batch for batch, _ in loader]).float()
    features, labels = extract_features(lambda x: x.mean(dim=(2, 3)), loader, CPU, mean=[0.5, 0.25], std=[0.5, 2.0])
    expected = ((images / 255).mean(dim=(2, 3)) - torch.tensor([0.5, 0.25])) / torch.tensor([0.5, 2.0])
    torch.testing.assert_close(features, expected)
    assert labels is not None
    assert labels.tolist() == list(range(9))


def test_what_takes_long_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "dino")
    extract_features(lambda x: x.mean(dim=(2, 3)), batches([4, 4, 1]), CPU, mean=[0, 0], std=[1, 1])
    assert not caplog.records
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    extract_features(lambda x: x.mean(dim=(2, 3)), batches([4, 4, 1]), CPU, mean=[0, 0], std=[1, 1])
    train_probes(torch.randn(8, 2), torch.arange(8) % 2, 2, [0.1], epochs=2)
    assert [record.message for record in caplog.records] == [
        "evaluating  4 of 9 images, left 00:00:00",
        "evaluating  8 of 9 images, left 00:00:00",
        "evaluating  1 of 2 epochs of linear probes, left 00:00:00",
    ]


def test_without_labels_there_are_none() -> None:
    loader = Listed((images, None) for images, _ in batches([3, 2]))
    features, labels = extract_features(lambda x: x.flatten(1), loader, CPU, mean=[0, 0], std=[1, 1])
    assert features.shape == (5, 32)
    assert labels is None


def test_a_module_is_evaluated_and_comes_back_as_it_was() -> None:
    model = Noisy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    first, _ = extract_features(model, batches([4, 2]), CPU, mean=[0, 0], std=[1, 1])
    second, _ = extract_features(model, batches([6]), CPU, mean=[0, 0], std=[1, 1])
    assert torch.equal(first, second)  # no masks, no batch statistics
    assert model.modes == {False}
    assert [part.training for part in (model, model.norm, model.drop, model.frozen)] == [True, True, True, False]
    assert torch.equal(torch.get_rng_state(), rng)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_mode_comes_back_after_an_error_too() -> None:
    model = Noisy()
    with pytest.raises(RuntimeError, match="on purpose"), evaluation_mode(model):
        raise RuntimeError("on purpose")
    assert model.training
    assert model.drop.training
    assert not model.frozen.training


def test_features_are_float32_and_may_be_trained_on() -> None:
    def context() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    layer = nn.Linear(32, 3)
    seen: list[torch.dtype] = []

    def model(images: Tensor) -> Tensor:
        output: Tensor = layer(images.flatten(1))
        seen.append(output.dtype)
        return output

    features, _ = extract_features(model, batches([4]), CPU, context, mean=[0, 0], std=[1, 1])
    assert seen == [torch.bfloat16]
    assert features.dtype == torch.float32
    probe = nn.Linear(3, 1)
    probe(features).sum().backward()
    assert probe.weight.grad is not None


def test_the_whole_range_of_pixels_is_normalised() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    assert normalized(images, [0.5], [0.25]).flatten().tolist() == [-2.0, 2.0]


def test_no_images_are_an_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        extract_features(lambda x: x, Listed(), CPU, mean=[0], std=[1])
