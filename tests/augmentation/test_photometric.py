"""Every operation against torchvision's float functional (blur: Pillow), one sample at a time."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from photometric_inputs import PLAIN, drawn, parameters, pictures
from PIL import Image, ImageFilter
from torch import Tensor

from dino.augmentation import photometric
from dino.augmentation.photometric import JitterForm, PhotometricSettings, apply_photometric
from dino.augmentation.views import JITTER_ORDERS, PhotometricParameters


def torchvision_jitter(image: Tensor, values: dict[str, float], order: tuple[str, ...]) -> Tensor:
    from torchvision.transforms.v2 import functional as V

    functions: dict[str, Callable[[Tensor, float], Tensor]] = {
        "brightness": V.adjust_brightness,
        "contrast": V.adjust_contrast,
        "saturation": V.adjust_saturation,
        "hue": V.adjust_hue,
    }
    for name in order:
        image = functions[name](image, values[name])
    return image


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("brightness", [0.0, 0.6, 1.0, 1.4, 3.0]),
        ("contrast", [0.0, 0.6, 1.0, 1.4, 3.0]),
        ("saturation", [0.0, 0.6, 1.0, 1.4, 3.0]),
        ("hue", [-0.5, -0.1, 0.0, 0.07, 0.5]),
    ],
)
def test_each_jitter_is_torchvisions(name: str, factors: list[float]) -> None:
    images = pictures(5)
    ours = apply_photometric(images, parameters(5, **{name: factors}), PLAIN)
    for image, factor, result in zip(images, factors, ours, strict=True):
        expected = torchvision_jitter(image / 255, {name: factor}, (name,))
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_jitter_follows_the_order_of_each_sample() -> None:
    """All 24 orders in one batch, each equal to torchvision's operations one after another."""
    images = pictures(1).expand(24, -1, -1, -1)
    values = {"brightness": 1.35, "contrast": 0.65, "saturation": 1.3, "hue": 0.09}
    given = {name: torch.full((24,), value) for name, value in values.items()}
    ours = apply_photometric(images, parameters(24, order=torch.arange(24), **given), PLAIN)
    for order, result in zip(JITTER_ORDERS, ours, strict=True):
        torch.testing.assert_close(result, torchvision_jitter(images[0] / 255, values, order), atol=2e-4, rtol=0)
    assert sum(torch.equal(a, b) for a, b in itertools.combinations(ours, 2)) == 0
    assert len(set(JITTER_ORDERS)) == 24


def test_grayscale_and_solarize_are_torchvisions() -> None:
    from torchvision.transforms.v2 import functional as V

    images = pictures(4)
    both = parameters(4, grayscale=[False, True, False, True], solarize=[False, False, True, True])
    ours = apply_photometric(images, both, PLAIN)
    torch.testing.assert_close(ours[0], images[0] / 255)
    torch.testing.assert_close(ours[1], V.rgb_to_grayscale(images[1] / 255, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[2], V.solarize(images[2] / 255, 128 / 255))
    gray = V.rgb_to_grayscale(images[3] / 255, 3)
    torch.testing.assert_close(ours[3], V.solarize(gray, 128 / 255), atol=1e-5, rtol=0)


def test_solarize_inverts_from_the_threshold_on() -> None:
    images = torch.tensor([126, 127, 128, 129], dtype=torch.uint8).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    ours = apply_photometric(images, parameters(1, solarize=[True]), PLAIN) * 255
    assert ours[0, 0].round().flatten().tolist() == [126, 127, 127, 126]


@pytest.mark.parametrize("size", [1, 5, 8, 33, 96])
def test_blur_is_the_gaussian_with_replicated_edges(size: int) -> None:
    """Against an explicit sum in float64; sizes around those of the tiles that are filtered at once."""
    images = pictures(3, size=size)
    sigmas = [0.1, 0.9, 2.0]
    ours = apply_photometric(images, parameters(3, blur_sigma=sigmas), PLAIN)
    offsets = np.arange(-40, 41)
    for image, sigma, result in zip(images, sigmas, ours, strict=True):
        weights = np.exp(-0.5 * (offsets / sigma) ** 2)
        weights /= weights.sum()
        expected = image.numpy() / 255
        for axis in (1, 2):
            padding = [(40, 40) if axis == a else (0, 0) for a in range(3)]
            padded = np.pad(expected, padding, mode="edge")
            shifted = [np.take(padded, np.arange(size) + 40 + offset, axis=axis) for offset in offsets]
            expected = sum(w * s for w, s in zip(weights, shifted, strict=True))
        np.testing.assert_allclose(result.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_nearly_pillows(sigma: float) -> None:
    """The original's blur is Pillow's, three box filters: on average less than one gray level away."""
    y, x = torch.meshgrid(torch.linspace(0, 9, 96), torch.linspace(0, 12, 96), indexing="ij")
    image = ((torch.stack([torch.sin(x * y), torch.cos(3 * x - y), torch.sin(y) > 0]) * 0.5 + 0.5) * 255).byte()
    ours = apply_photometric(image[None], parameters(1, blur_sigma=[sigma]), PLAIN)[0]
    photo = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    pillow = torch.from_numpy(np.array(photo.filter(ImageFilter.GaussianBlur(sigma)))).permute(2, 0, 1) / 255
    assert (ours - pillow).abs().mean() < 1 / 255


def test_images_without_operations_are_only_normalised() -> None:
    images = pictures(3)
    settings = PhotometricSettings([0.4, 0.5, 0.6], [0.1, 0.2, 0.3], 128, 2.0)
    ours = apply_photometric(images, parameters(3), settings)
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    torch.testing.assert_close(ours, (images / 255 - mean) / std)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()


def test_a_batch_equals_its_samples_alone() -> None:
    images, given = pictures(40, size=24), drawn(40)
    together = apply_photometric(images, given, PLAIN)
    for i in range(40):
        one = PhotometricParameters(**{name: value[i : i + 1] for name, value in vars(given).items()})
        torch.testing.assert_close(apply_photometric(images[i : i + 1], one, PLAIN)[0], together[i], atol=1e-5, rtol=0)


def test_inputs_stay_as_they_were() -> None:
    images, given = pictures(6), drawn(6)
    before = images.clone()
    apply_photometric(images, given, PLAIN)
    assert torch.equal(images, before)


@pytest.mark.parametrize("every", [{"grayscale": [True] * 4}, {"blur_sigma": [1.0] * 4}, {"solarize": [True] * 4}])
def test_an_operation_on_every_image_composes_with_the_next(every: dict[str, list[float]]) -> None:
    """Where all images are touched nothing is gathered; the result must still be an ordinary tensor."""
    images = pictures(4)
    for more in ({}, {"solarize": [False, True, False, False]}, {"blur_sigma": [0.0, 0.0, 1.5, 0.0]}):
        together = apply_photometric(images, parameters(4, **(every | more)), PLAIN)
        assert together.is_contiguous()
        for i in range(4):
            one = parameters(1, **{name: value[i : i + 1] for name, value in (every | more).items()})
            alone = apply_photometric(images[i : i + 1], one, PLAIN)
            torch.testing.assert_close(alone[0], together[i], atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels", [1, 5])
def test_other_channel_counts(channels: int) -> None:
    """Brightness, contrast, blur and solarize; contrast is taken about the mean over all channels."""
    images = pictures(2, channels)
    settings = PhotometricSettings([0.0] * channels, [1.0] * channels, 128, 2.0)
    given = parameters(2, contrast=[0.5, 1.0], blur_sigma=[0.0, 1.0], solarize=[False, True])
    ours = apply_photometric(images, given, settings)
    first = images[0] / 255
    torch.testing.assert_close(ours[0], 0.5 * first + 0.5 * first.mean())
    assert ours.shape == images.shape
    assert not torch.equal(ours[1], images[1] / 255)


def test_nothing_is_rounded_under_autocast() -> None:
    images, given = pictures(8), drawn(8)
    expected = apply_photometric(images, given, PLAIN)
    with torch.autocast("cpu", torch.bfloat16):
        ours = apply_photometric(images, given, PLAIN)
    assert torch.equal(ours, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("jitter_form", ["exact", "matrix"])
def test_on_cuda_the_values_agree_and_nothing_waits(jitter_form: JitterForm) -> None:
    settings = dataclasses.replace(PLAIN, jitter_form=jitter_form)
    images, given = pictures(32, size=40), drawn(32)
    expected = apply_photometric(images, given, settings)
    on_device = images.cuda()
    apply_photometric(on_device, given, settings)  # the first call loads kernels
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = apply_photometric(on_device, given, settings)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.testing.assert_close(ours.cpu(), expected, atol=2e-3, rtol=0)


def test_filters_sum_to_one_and_are_as_wide_as_asked() -> None:
    filters = photometric.blur_filters(torch.tensor([0.1, 1.0, 2.0]), reach=8, tile=4)
    assert filters.shape == (3, 20, 4)
    torch.testing.assert_close(filters.sum(dim=1), torch.ones(3, 4))
    assert (filters[2, :17, 0] > 0).all()
    assert (filters[2, 17:, 0] == 0).all()
