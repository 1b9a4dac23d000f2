"""What the workers colour is what the batched form colours, but for one rounding to uint8; and the matrix form."""

from typing import Any

import numpy as np
import pytest
import torch
from photometric_inputs import PLAIN, drawn, parameters, pictures
from torch import Tensor

from dino.augmentation import MultiCrop
from dino.augmentation.jitter_matrix import LUMA, jitter_matrices
from dino.augmentation.photometric import PhotometricSettings, apply_photometric
from dino.augmentation.photometric_cpu import colour

MATRIX = PhotometricSettings([0.0] * 3, [1.0] * 3, 128, 2.0, jitter_form="matrix")


def smooth(n: int, size: int = 48) -> Tensor:
    """uint8 [n, 3, size, size], with colours like those of a photograph."""
    y, x = torch.meshgrid(torch.linspace(0, 3, size), torch.linspace(0, 4, size), indexing="ij")
    phases = torch.arange(n)[:, None, None] * 0.7
    waves = [torch.sin(x + y + phases), torch.cos(2 * x - y + phases), torch.sin(2 * y - phases)]
    return (torch.stack(waves, dim=1) * 60 + 120).byte()


@pytest.mark.parametrize("settings", [PLAIN, MATRIX], ids=["exact", "matrix"])
@pytest.mark.parametrize(("channels", "size"), [(3, 48), (3, 5), (1, 20), (5, 20)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_workers_colour_as_the_device_does(
    settings: PhotometricSettings, channels: int, size: int, layout: torch.memory_format
) -> None:
    """No more than the rounding apart: half a level, and what float32 and the cut of the Gaussian leave.

    A value that only float32 puts below or above the threshold of solarize is one level further.
    """
    images, given = pictures(60, channels, size).contiguous(memory_format=layout), drawn(60)
    if channels != 3:
        given = parameters(60, **{name: getattr(given, name) for name in ("order", "brightness", "contrast")})
    general = PhotometricSettings([0.0] * channels, [1.0] * channels, 128, 2.0, settings.jitter_form)
    before = images.clone()
    ours = colour(images, given, general)
    batched = apply_photometric(images, given, general) * 255
    assert ours.dtype == torch.uint8
    assert torch.equal(images, before)
    apart = (ours - batched).abs()
    assert (apart > 0.52).float().mean() < 1e-5
    assert apart.max() < 1.02
    assert (ours - batched.round()).abs().max() <= 1


@pytest.mark.parametrize("threshold", [64, 128, 200.5])
def test_workers_solarize_before_they_round(threshold: float) -> None:
    """Rounding first would invert what lies just below the threshold."""
    settings = PhotometricSettings([0.0] * 3, [1.0] * 3, threshold, 2.0)
    images, given = pictures(20), parameters(20, brightness=torch.linspace(0.6, 1.4, 20), solarize=[True] * 20)
    apart = (colour(images, given, settings) - apply_photometric(images, given, settings) * 255).abs()
    assert apart.max() < 0.52


@pytest.mark.parametrize("settings", [PLAIN, MATRIX], ids=["exact", "matrix"])
def test_neutral_parameters_leave_every_byte(settings: PhotometricSettings) -> None:
    assert torch.equal(colour(pictures(4), parameters(4), settings), pictures(4))


def test_a_view_coloured_by_a_worker_does_not_depend_on_the_batch() -> None:
    for settings in (PLAIN, MATRIX):
        images, given = pictures(12), drawn(12)
        together = colour(images, given, settings)
        for i in range(12):
            one = type(given)(**{name: value[i : i + 1] for name, value in vars(given).items()})
            assert torch.equal(colour(images[i : i + 1], one, settings)[0], together[i])


@pytest.mark.parametrize("jitter_form", ["exact", "matrix"])
def test_both_places_give_the_same_views(jitter_form: Any) -> None:
    """Through MultiCrop, on views as they are cropped; `photometric` ends both ways."""
    views = MultiCrop(global_size=64, local_size=32, num_local_views=3, jitter_form=jitter_form)
    batch = views.views([image.contiguous() for image in smooth(8, 90)], np.arange(8), 0, 0)
    coloured = views.colour(batch)
    assert coloured.parameters is None
    assert coloured.global_views.dtype == torch.uint8
    level = 1 / 255 / min(views.std)
    for name in ("global_views", "local_views"):
        there, here = getattr(views.photometric(batch), name), getattr(views.photometric(coloured), name)
        assert there.dtype == here.dtype == torch.float32
        assert there.shape == here.shape
        assert (there - here).abs().max() < 0.52 * level


def test_normalised_views_are_not_normalised_again() -> None:
    views = MultiCrop(global_size=16, local_size=8)
    done = views.photometric(views.views(smooth(2), np.arange(2), 0, 0))
    with pytest.raises(AssertionError, match="normalised already"):
        views.photometric(done)


# ---------------------------------------------------------------------- the matrix form


def test_without_hue_and_clipping_the_matrix_is_exact() -> None:
    """All 24 orders, of factors that keep every value between 0 and 1."""
    images = (smooth(1) // 2 + 60).expand(24, -1, -1, -1)
    given = parameters(24, order=torch.arange(24), brightness=[1.1] * 24, contrast=[0.8] * 24, saturation=[1.15] * 24)
    by_matrix, exact = (apply_photometric(images, given, settings) for settings in (MATRIX, PLAIN))
    torch.testing.assert_close(by_matrix, exact, atol=1e-4, rtol=0)  # the weights of the luma add up to 0.9999


@pytest.mark.parametrize("shift", [-0.1, 0.04, 0.1])
def test_the_hue_turns_the_way_of_hsv_and_keeps_luma_and_gray(shift: float) -> None:
    matrix = jitter_matrices(parameters(1, hue=[shift]), torch.tensor([[0.5, 0.5, 0.5]]))[0]
    assert matrix[:, 3].abs().max() == 0
    luma = torch.tensor(LUMA)
    torch.testing.assert_close(luma @ matrix[:, :3], luma, atol=1e-5, rtol=0)
    torch.testing.assert_close(matrix[:, :3].sum(dim=1), torch.ones(3), atol=1e-2, rtol=0)
    muted = torch.tensor([0.6, 0.4, 0.4])
    red, green, blue = (matrix[:, :3] @ muted).tolist()
    assert red > max(green, blue)
    assert (green > blue) == (shift > 0)


def test_the_matrix_is_near_the_exact_jitter_on_muted_colours_and_another_one() -> None:
    """With the original's strengths: a few of 255 levels apart on average, as docs/data.md says."""
    generator = torch.Generator().manual_seed(0)
    strengths = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2}
    given = {name: 1 + x * (2 * torch.rand(64, generator=generator) - 1) for name, x in strengths.items()}
    given["hue"] = 0.1 * (2 * torch.rand(64, generator=generator) - 1)
    jitter = parameters(64, order=torch.arange(64) % 24, **given)
    apart = 255 * (apply_photometric(smooth(64), jitter, MATRIX) - apply_photometric(smooth(64), jitter, PLAIN)).abs()
    assert 1 < apart.mean() < 10


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"augmentation\.jitter_form is 'fast'; it must be one of exact, matrix"):
        MultiCrop(jitter_form="fast")  # type: ignore[arg-type]
