"""Images and photometric parameters for the tests of the photometric operations, wherever they run."""

import torch
from torch import Tensor

from dino.augmentation.photometric import PhotometricSettings
from dino.augmentation.views import PhotometricParameters

PLAIN = PhotometricSettings(mean=[0.0] * 3, std=[1.0] * 3, solarize_threshold=128, largest_blur_sigma=2.0)


def pictures(n: int, channels: int = 3, size: int = 20) -> Tensor:
    """uint8 [n, channels, size, size]: noise, with a gray, a black, a white and a one-coloured corner in each."""
    images = torch.randint(0, 256, (n, channels, size, size), generator=torch.Generator().manual_seed(3))
    images[:, :, :4, :4] = 90
    images[:, :, :4, -4:] = 0
    images[:, :, -4:, :4] = 255
    images[:, 1:, -4:, -4:] = 7
    return images.to(torch.uint8)


def parameters(n: int, **given: Tensor | list[float]) -> PhotometricParameters:
    """Neutral but for what is given."""
    values = {name: torch.ones(n) for name in ("brightness", "contrast", "saturation")}
    values |= {"hue": torch.zeros(n), "blur_sigma": torch.zeros(n), "order": torch.zeros(n, dtype=torch.int64)}
    values |= {"grayscale": torch.zeros(n, dtype=torch.bool), "solarize": torch.zeros(n, dtype=torch.bool)}
    for name, value in given.items():
        values[name] = torch.as_tensor(value).to(values[name].dtype)
    return PhotometricParameters(**values)


def drawn(n: int, seed: int = 0) -> PhotometricParameters:
    """Parameters of every kind, about half of them neutral."""
    generator = torch.Generator().manual_seed(seed)

    def some(low: float, high: float, neutral: float) -> Tensor:
        values = low + (high - low) * torch.rand(n, generator=generator)
        return torch.where(torch.rand(n, generator=generator) < 0.5, values, neutral)

    return PhotometricParameters(
        order=torch.randint(0, 24, (n,), generator=generator),
        brightness=some(0.6, 1.4, 1),
        contrast=some(0.6, 1.4, 1),
        saturation=some(0.6, 1.4, 1),
        hue=some(-0.5, 0.5, 0),
        grayscale=torch.rand(n, generator=generator) < 0.3,
        blur_sigma=some(0.1, 2.0, 0),
        solarize=torch.rand(n, generator=generator) < 0.3,
    )
