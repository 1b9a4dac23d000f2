"""Multi-crop views by PIL and torchvision, one image at a time."""

import random
from collections.abc import Callable, Sequence

from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode


def multi_crop_transform(
    *,
    num_local_views: int = 8,
    global_size: int = 224,
    local_size: int = 96,
    global_scale: Sequence[float] = (0.4, 1.0),
    local_scale: Sequence[float] = (0.05, 0.4),
    flip_probability: float = 0.5,
    jitter: Sequence[float] = (0.4, 0.4, 0.2, 0.1),
    grayscale_probability: float = 0.2,
    blur_probability: Sequence[float] = (1.0, 0.1, 0.5),
    solarize_probability: float = 0.2,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> Callable[[Image.Image], list[Tensor]]:
    """A function from an image to its 2 + L normalised views; the defaults are the original's.

    Args:
        jitter: strength of brightness, contrast, saturation and hue.
        blur_probability: of the first global, the second global and each local view.
    """
    colour = transforms.Compose(
        [
            transforms.RandomHorizontalFlip(flip_probability),
            transforms.RandomApply([transforms.ColorJitter(*jitter)], p=0.8),
            transforms.RandomGrayscale(grayscale_probability),
        ]
    )
    normalize = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])

    def view(size: int, scale: Sequence[float], blur: float, solarize: float) -> transforms.Compose:
        crop = transforms.RandomResizedCrop(size, scale=tuple(scale), interpolation=InterpolationMode.BICUBIC)
        return transforms.Compose([crop, colour, GaussianBlur(blur), Solarize(solarize), normalize])

    global_views = [
        view(global_size, global_scale, blur_probability[0], 0.0),
        view(global_size, global_scale, blur_probability[1], solarize_probability),
    ]
    local_view = view(local_size, local_scale, blur_probability[2], 0.0)

    def transform(image: Image.Image) -> list[Tensor]:
        return [make(image) for make in (*global_views, *[local_view] * num_local_views)]

    return transform


class GaussianBlur:
    """PIL's, with a radius from 0.1 to 2 pixels."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.probability:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class Solarize:
    """Inverts values from 128 on."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < self.probability else image
