"""Views are a function of (seed, epoch, index, view); how often what happens; other numbers of channels."""

import dataclasses
import hashlib
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino.augmentation import MultiCrop, ViewBatch
from dino.augmentation.crop import crop
from dino.augmentation.views import JITTER_ORDERS, PhotometricParameters

SMALL = {"global_size": 16, "local_size": 8, "num_local_views": 3}


def multi_crop(channels: int = 3, **settings: Any) -> MultiCrop:
    return MultiCrop(**(SMALL | {"channels": channels, "mean": [0.5] * channels, "std": [0.25] * channels} | settings))


class Images:
    """A source: stacked uint8 images, or the same ones by single reads."""

    def __init__(self, images: Tensor, *, stacked: bool, labels: NDArray[np.int64] | None = None) -> None:
        self._images = images
        self.images = images if stacked else None
        self.labels = labels
        self.num_reads = 0

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f"image {index}"

    def mode(self, index: int) -> str:
        return "RGB"

    def read(self, index: int) -> Tensor:
        self.num_reads += 1
        return self._images[index]


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def hashes(batch: ViewBatch) -> dict[int, str]:
    """Sample index -> hash of its views and parameters."""
    result = {}
    for row, index in enumerate(batch.indices.tolist()):
        digest = hashlib.sha256(batch.global_views[:, row].numpy().tobytes())
        if batch.local_views is not None:
            digest.update(batch.local_views[:, row].numpy().tobytes())
        if batch.parameters is not None:
            for name, values in sorted(vars(batch.parameters).items()):
                digest.update(name.encode() + values[:, row].numpy().tobytes())
        result[index] = digest.hexdigest()
    return result


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 40, 50)])
def test_views_depend_neither_on_the_batch_nor_on_its_order(shape: tuple[int, int, int], stacked: bool) -> None:
    source = Images(noise(60, *shape), stacked=stacked)
    views = multi_crop(shape[0])
    together = hashes(views(source, np.arange(60), seed=3, epoch=5))
    assert len(set(together.values())) == 60
    for count in (1, 7, 32):
        order = np.random.default_rng(count).permutation(60)
        apart: dict[int, str] = {}
        for first in range(0, 60, count):
            apart |= hashes(views(source, order[first : first + count], seed=3, epoch=5))
        assert apart == together


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}])
def test_views_depend_on_seed_and_epoch(other: dict[str, int]) -> None:
    source = Images(noise(20, 3, 12, 12), stacked=True)
    views, indices = multi_crop(), np.arange(20)
    first = hashes(views(source, indices, seed=0, epoch=0))
    changed = hashes(views(source, indices, **({"seed": 0, "epoch": 0} | other)))
    assert not set(first.values()) & set(changed.values())
    assert hashes(views(source, indices, seed=0, epoch=0)) == first


def test_the_number_of_local_views_does_not_change_the_others() -> None:
    source, indices = Images(noise(10, 3, 12, 12), stacked=True), np.arange(10)
    none, five = (multi_crop(num_local_views=n)(source, indices, seed=0, epoch=0) for n in (0, 5))
    assert none.local_views is None
    assert five.local_views is not None
    assert torch.equal(none.global_views, five.global_views)
    three = multi_crop()(source, indices, seed=0, epoch=0)
    assert three.local_views is not None
    assert torch.equal(three.local_views, five.local_views[:3])


def test_a_probability_does_not_change_other_draws() -> None:
    indices, sizes = np.arange(50), np.full(50, 30)
    boxes, flips, parameters = multi_crop().draw(indices, sizes, sizes, seed=0, epoch=0)
    others = multi_crop(blur_probability=[0, 0, 0], grayscale_probability=0)
    same_boxes, same_flips, changed = others.draw(indices, sizes, sizes, seed=0, epoch=0)
    np.testing.assert_array_equal(same_boxes, boxes)
    np.testing.assert_array_equal(same_flips, flips)
    assert torch.equal(changed.hue, parameters.hue)
    assert torch.equal(changed.solarize, parameters.solarize)
    assert (changed.blur_sigma == 0).all()


def test_what_is_drawn_first_is_drawn_for_ever() -> None:
    """Pins the slots of the random numbers: a change of these values changes the views of every run so far."""
    boxes, flips, parameters = multi_crop().draw(np.array([12]), np.array([375]), np.array([500]), seed=1, epoch=2)
    assert boxes[:, 0].tolist() == [
        [69, 38, 274, 363],
        [89, 149, 283, 285],
        [219, 307, 147, 153],
        [171, 37, 149, 127],
        [149, 37, 215, 181],
    ]
    assert flips[:, 0].tolist() == [True, False, False, True, True]
    assert parameters.order[:, 0].tolist() == [12, 2, 0, 19, 5]
    torch.testing.assert_close(parameters.hue[:, 0], torch.tensor([-0.074334, -0.018377, -0.08544, 0.0, -0.090191]))
    torch.testing.assert_close(parameters.blur_sigma[:, 0], torch.tensor([0.746417, 0.0, 0.186833, 0.0, 0.882049]))


@pytest.fixture(scope="module")
def many() -> tuple[NDArray[np.bool_], PhotometricParameters]:
    """Flips and parameters of 20,000 samples, with the original's settings."""
    sizes = np.full(20_000, 64)
    _, flips, parameters = multi_crop().draw(np.arange(20_000), sizes, sizes, seed=0, epoch=0)
    return flips, parameters


def test_how_often_each_operation_happens(many: tuple[NDArray[np.bool_], PhotometricParameters]) -> None:
    """Per view, as in main_dino.py; 0.015 is four standard errors of the most uncertain rate."""
    flips, parameters = many

    def rates(values: Any) -> NDArray[np.float64]:
        return np.asarray(values, dtype=float).mean(axis=1)

    local = (3,)
    np.testing.assert_allclose(rates(flips), np.full(5, 0.5), atol=0.015)
    np.testing.assert_allclose(rates(parameters.brightness != 1), np.full(5, 0.8), atol=0.015)
    np.testing.assert_allclose(rates(parameters.hue != 0), np.full(5, 0.8), atol=0.015)
    np.testing.assert_allclose(rates(parameters.grayscale), np.full(5, 0.2), atol=0.015)
    np.testing.assert_allclose(rates(parameters.blur_sigma > 0), [1.0, 0.1, *np.full(local, 0.5)], atol=0.015)
    np.testing.assert_allclose(rates(parameters.solarize), [0, 0.2, 0, 0, 0], atol=0.015)
    assert (parameters.blur_sigma[0] > 0).all()


def test_strengths_fill_their_ranges(many: tuple[NDArray[np.bool_], PhotometricParameters]) -> None:
    _, parameters = many
    jittered = parameters.brightness != 1
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ):
        values = getattr(parameters, name)[jittered]
        assert low <= values.min() < low + 0.01
        assert high - 0.01 < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.005
    sigma = parameters.blur_sigma[parameters.blur_sigma > 0]
    assert 0.1 <= sigma.min() < 0.11
    assert 1.99 < sigma.max() <= 2.0
    counts = torch.bincount(parameters.order.flatten(), minlength=len(JITTER_ORDERS))
    assert len(counts) == 24
    assert ((counts / counts.sum() * 24 - 1).abs() < 0.1).all()


def test_jitter_is_all_or_nothing(many: tuple[NDArray[np.bool_], PhotometricParameters]) -> None:
    _, parameters = many
    assert torch.equal(parameters.brightness != 1, parameters.saturation != 1)
    assert torch.equal(parameters.brightness != 1, parameters.hue != 0)


def test_parameters_differ_between_samples_and_views(many: tuple[NDArray[np.bool_], PhotometricParameters]) -> None:
    _, parameters = many
    hue = parameters.hue[:, :50]
    jittered = hue[hue != 0]
    assert len(jittered.unique()) == len(jittered)


def test_a_brightness_above_one_never_inverts() -> None:
    sizes = np.full(2_000, 20)
    _, _, parameters = multi_crop(brightness=1.5).draw(np.arange(2_000), sizes, sizes, seed=0, epoch=0)
    assert parameters.brightness.min() >= 0
    assert parameters.brightness.max() > 2.4


def test_shapes_and_types_through_both_parts() -> None:
    labels = np.arange(9) % 3
    source = Images(noise(9, 3, 20, 24), stacked=True, labels=labels)
    views = multi_crop()
    batch = views(source, np.array([4, 0, 8]), seed=0, epoch=0)
    assert batch.global_views.shape == (2, 3, 3, 16, 16)
    assert batch.local_views is not None
    assert batch.local_views.shape == (3, 3, 3, 8, 8)
    assert batch.global_views.dtype == batch.local_views.dtype == torch.uint8
    assert batch.indices.tolist() == [4, 0, 8]
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 0, 2]
    assert batch.bad == ()
    done = views.photometric(batch)
    assert done.local_views is not None
    assert done.parameters is None
    assert done.global_views.shape == batch.global_views.shape
    assert done.global_views.dtype == done.local_views.dtype == torch.float32
    assert done.indices is batch.indices


def test_views_are_cut_and_mirrored_as_drawn() -> None:
    images, indices, sizes = noise(12, 3, 40, 40), np.arange(12), np.full(12, 40)
    views = multi_crop()
    batch = views.views(images, indices, 0, 0)
    boxes, flips, parameters = views.draw(indices, sizes, sizes, seed=0, epoch=0)
    assert batch.parameters is not None
    assert torch.equal(batch.parameters.hue, parameters.hue)
    assert torch.equal(batch.global_views, crop(images, boxes[:2], flips[:2], 16))
    assert batch.local_views is not None
    assert torch.equal(batch.local_views, crop(images, boxes[2:], flips[2:], 8))


def test_each_file_is_read_once() -> None:
    source = Images(noise(6, 3, 40, 40), stacked=False)
    multi_crop()(source, np.arange(6), seed=0, epoch=0)
    assert source.num_reads == 6


def test_stacked_and_single_images_give_the_same_views_beyond_the_small() -> None:
    images, indices = noise(5, 3, 40, 50), np.arange(5)
    one = multi_crop()(Images(images, stacked=True), indices, seed=0, epoch=0)
    other = multi_crop()(Images(images, stacked=False), indices, seed=0, epoch=0)
    assert hashes(one) == hashes(other)


def test_images_of_different_sizes() -> None:
    images = [noise(3, 40, 60), noise(3, 9, 300), noise(3, 200, 33)]
    batch = multi_crop().views(images, np.arange(3), 0, 0, bad=(2,))
    assert batch.global_views.shape == (2, 3, 3, 16, 16)
    assert batch.bad == (2,)
    alone = multi_crop().views(images[1:2], np.array([1]), 0, 0)
    assert hashes(alone)[1] == hashes(batch)[1]


def test_no_local_views() -> None:
    views = multi_crop(num_local_views=0)
    batch = views(Images(noise(4, 3, 20, 20), stacked=True), np.arange(4), seed=0, epoch=0)
    done = views.photometric(batch)
    assert batch.local_views is None
    assert done.local_views is None
    assert done.global_views.shape == (2, 4, 3, 16, 16)


def test_photometric_is_per_view_and_sample() -> None:
    """The parameters of view v and sample b reach exactly that image: flattened view-major."""
    views = multi_crop()
    batch = views(Images(noise(6, 3, 20, 20), stacked=True), np.arange(6), seed=0, epoch=0)
    together = views.photometric(batch)
    assert together.local_views is not None
    for b in range(6):
        alone = views.photometric(views(Images(noise(6, 3, 20, 20), stacked=True), np.array([b]), seed=0, epoch=0))
        assert alone.local_views is not None
        torch.testing.assert_close(alone.global_views[:, 0], together.global_views[:, b], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.local_views[:, 0], together.local_views[:, b], atol=1e-5, rtol=0)


def test_normalisation_uses_each_channels_mean_and_std() -> None:
    off = {
        "jitter_probability": 0,
        "grayscale_probability": 0,
        "blur_probability": [0, 0, 0],
        "solarize_probability": 0,
    }
    views = multi_crop(2, mean=[0.25, 0.5], std=[0.5, 0.125], **off)
    batch = views(Images(noise(3, 2, 10, 10), stacked=True), np.arange(3), seed=0, epoch=0)
    done = views.photometric(batch)
    for channel, (mean, std) in enumerate(((0.25, 0.5), (0.5, 0.125))):
        expected = (batch.global_views[:, :, channel] / 255 - mean) / std
        torch.testing.assert_close(done.global_views[:, :, channel], expected)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_without_three_channels_the_colour_operations_drop_out_with_a_notice(channels: int) -> None:
    views = multi_crop(channels)
    (notice,) = views.notices
    for word in ("saturation", "hue", "grayscale", f"{channels} channel"):
        assert word in notice
    batch = views(Images(noise(30, channels, 12, 12), stacked=True), np.arange(30), seed=0, epoch=0)
    assert batch.parameters is not None
    assert (batch.parameters.saturation == 1).all()
    assert (batch.parameters.hue == 0).all()
    assert not batch.parameters.grayscale.any()
    assert (batch.parameters.brightness != 1).any()
    assert (batch.parameters.blur_sigma > 0).any()
    assert views.photometric(batch).global_views.shape == (2, 30, channels, 16, 16)


def test_no_notice_where_nothing_was_asked_for() -> None:
    assert multi_crop(3).notices == []
    assert multi_crop(1, saturation=0, hue=0, grayscale_probability=0).notices == []
    assert multi_crop(1, jitter_probability=0, grayscale_probability=0).notices == []
    (notice,) = multi_crop(1, saturation=0, grayscale_probability=0).notices
    assert "hue" in notice
    assert "saturation" not in notice


def test_images_with_other_channels_than_said_are_refused() -> None:
    with pytest.raises(ValueError, match=r"augmentation\.channels is 3, but the images have 1; set dataset\.channels"):
        multi_crop().views(noise(2, 1, 8, 8), np.arange(2), 0, 0)


def test_it_survives_the_way_to_a_worker() -> None:
    source = Images(noise(4, 3, 20, 20), stacked=True)
    views = multi_crop()
    copy = pickle.loads(pickle.dumps(views))
    indices = np.arange(4)
    assert hashes(copy(source, indices, seed=0, epoch=0)) == hashes(views(source, indices, seed=0, epoch=0))


def test_to_leaves_the_parameters_on_the_host() -> None:
    batch = multi_crop()(Images(noise(4, 3, 20, 20), stacked=True), np.arange(4), seed=0, epoch=0)
    batch = dataclasses.replace(batch, labels=torch.arange(4))
    there = batch.to("meta")
    assert there.local_views is not None
    assert there.labels is not None
    for tensor in (there.global_views, there.local_views, there.indices, there.labels):
        assert tensor.device.type == "meta"
    assert there.parameters is batch.parameters
    assert there.bad == batch.bad


def test_real_photographs(shared_data: Any) -> None:
    """Crops of photographs keep their mean colour on average, whatever the operations that are not colour."""
    from PIL import Image

    paths = sorted((shared_data("imagenette_mini") / "train").rglob("*.JPEG"))[:6] or pytest.skip("no JPEG files")
    images = [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) for path in paths]
    settings = {"jitter_probability": 0, "grayscale_probability": 0, "solarize_probability": 0}
    plain = MultiCrop(num_local_views=2, global_scale=[0.9, 1.0], **settings)
    batch = plain.views(images, np.arange(6), 0, 0)
    assert batch.global_views.shape == (2, 6, 3, 224, 224)
    done = plain.photometric(batch)
    mean, std = torch.tensor(plain.mean)[:, None, None], torch.tensor(plain.std)[:, None, None]
    for row, image in enumerate(images):
        seen = done.global_views[:, row] * std + mean
        assert (seen.mean(dim=(0, 2, 3)) - image.float().mean(dim=(1, 2)) / 255).abs().max() < 0.06
