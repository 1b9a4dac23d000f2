"""Boxes against torchvision's distribution, pixels against Pillow and torchvision, and independence of the batch."""

import itertools
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from dino.augmentation import draws
from dino.augmentation.crop import crop, crop_by_matrices, crop_one_by_one, random_boxes
from dino.augmentation.randomness import uniforms

RATIO = (3 / 4, 4 / 3)
PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def boxes_of(
    n: int, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float] = RATIO, views: int = 1
) -> NDArray[np.int64]:
    u = uniforms(0, 0, np.tile(np.arange(n), views), np.repeat(np.arange(views), n), draws.NUM_DRAWS)
    return random_boxes(u.reshape(views, n, -1), np.full(n, height), np.full(n, width), scale, ratio)


def unmirrored(boxes: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.zeros(boxes.shape[:2], dtype=bool)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def smooth(height: int, width: int) -> torch.Tensor:
    """[3, height, width], like a photograph: no detail finer than some pixels."""
    y, x = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 12, width), indexing="ij")
    waves = [torch.sin(x + y), torch.cos(2 * x - y), torch.sin(3 * y) * torch.cos(x)]
    return ((torch.stack(waves) * 0.5 + 0.5) * 255).to(torch.uint8)


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
@pytest.mark.parametrize("size", [(375, 500), (8, 8), (300, 60)])
def test_boxes_are_distributed_as_torchvisions(scale: tuple[float, float], size: tuple[int, int]) -> None:
    """Mean and spread of position, sides, area and ratio; images of 300 x 60 often need the central fallback."""
    from torchvision.transforms import RandomResizedCrop

    height, width = size
    n = 4_000
    ours = boxes_of(n, height, width, scale)[0].astype(float)
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(RATIO)) for _ in range(n)], dtype=float)

    def quantities(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        area, ratio = boxes[:, 2] * boxes[:, 3] / (height * width), np.log(boxes[:, 3] / boxes[:, 2])
        return np.column_stack([boxes, area, ratio])

    a, b = quantities(ours), quantities(theirs)
    error = np.sqrt((a.var(axis=0) + b.var(axis=0)) / n) + 1e-9
    assert (np.abs(a.mean(axis=0) - b.mean(axis=0)) < 4 * error).all()
    np.testing.assert_allclose(a.std(axis=0), b.std(axis=0), rtol=0.08, atol=1e-9)


def test_boxes_lie_inside_and_reach_every_edge() -> None:
    boxes = boxes_of(5_000, 9, 13, (0.05, 1.0))[0]
    top, left, height, width = boxes.T
    assert top.min() == 0
    assert left.min() == 0
    assert height.min() >= 1
    assert width.min() >= 1
    assert (top + height).max() == 9
    assert (left + width).max() == 13


@pytest.mark.parametrize(
    ("size", "expected"), [((400, 10), (193, 0, 13, 10)), ((10, 400), (0, 193, 10, 13)), ((10, 12), (0, 0, 10, 12))]
)
def test_central_fallback(size: tuple[int, int], expected: tuple[int, ...]) -> None:
    """Where no attempt can fit (an area of several images), the largest central box of valid ratio is taken."""
    boxes = boxes_of(20, *size, scale=(30.0, 40.0))[0]
    assert {tuple(box) for box in boxes.tolist()} == {expected}


def test_an_image_of_one_pixel_is_cropped() -> None:
    boxes = boxes_of(4, 1, 1, (0.05, 0.4), views=2)
    images = noise(4, 1, 1, 1)
    views = crop(images, boxes, np.zeros((2, 4), dtype=bool), 3)
    assert torch.equal(views, images.expand(2, 4, 1, 3, 3))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("shape", "size"), [((1, 8, 8), 16), ((3, 17, 24), 16), ((2, 32, 32), 9)])
def test_matrices_give_pillows_pixels(
    shape: tuple[int, int, int], size: int, interpolation: Literal["bicubic", "bilinear"]
) -> None:
    """Bit by bit, on noise. Across before down is asked for explicitly: Pillow may choose the other order."""
    images = noise(12, *shape)
    boxes = boxes_of(12, *shape[1:], (0.05, 1.0), views=2)
    views = crop_by_matrices(images, boxes, unmirrored(boxes), size, interpolation)
    for view, image, channel in itertools.product(range(2), range(12), range(shape[0])):
        top, left, height, width = boxes[view, image].tolist()
        box = Image.fromarray(images[image, channel].numpy()).crop((left, top, left + width, top + height))
        expected = box.resize((size, height), PILLOW[interpolation]).resize((size, size), PILLOW[interpolation])
        np.testing.assert_array_equal(views[view, image, channel].numpy(), np.array(expected))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (5, 20, 16)])
def test_the_two_ways_agree(shape: tuple[int, int, int], interpolation: Literal["bicubic", "bilinear"]) -> None:
    """On pictures; torch's weights have fewer bits, so some pixels fall on the other side of a rounding or two."""
    images = torch.stack([smooth(60 + 4 * i, 60)[:, : shape[1], : shape[2]] for i in range(16)])
    images = images.repeat(1, 2, 1, 1)[:, : shape[0]].contiguous()
    boxes = boxes_of(16, *shape[1:], (0.1, 1.0), views=3)
    by_matrices = crop_by_matrices(images, boxes, unmirrored(boxes), 24, interpolation)
    one_by_one = crop_one_by_one(images, boxes, unmirrored(boxes), 24, interpolation)
    difference = (by_matrices.int() - one_by_one).abs()
    assert difference.max() <= {"bicubic": 1, "bilinear": 2}[interpolation]
    assert difference.float().mean() < {"bicubic": 0.01, "bilinear": 0.04}[interpolation]


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_large_crops_are_torchvisions_and_nearly_pillows(layout: str) -> None:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as V

    image = smooth(150, 200)
    if layout == "channels last":
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    boxes = boxes_of(1, 150, 200, (0.05, 1.0), views=12)
    for size in (96, 224):
        views = crop([image], boxes, np.zeros((12, 1), dtype=bool), size)
        for view, (box,) in zip(views, boxes.tolist(), strict=True):
            theirs = V.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
            assert (view[0].int() - theirs.int()).abs().max() <= 1
            top, left, height, width = box
            photo = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            pillow = photo.crop((left, top, left + width, top + height)).resize((size, size), PILLOW["bicubic"])
            difference = np.abs(view[0].permute(1, 2, 0).numpy().astype(int) - np.array(pillow))
            assert difference.mean() < 0.05


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
def test_channels_are_resized_alike_whatever_their_number(channels: int) -> None:
    image = noise(channels, 50, 40)
    boxes = boxes_of(1, 50, 40, (0.2, 1.0), views=3)
    together = crop_one_by_one([image], boxes, unmirrored(boxes), 20, "bicubic")
    for channel in range(channels):
        alone = crop_one_by_one([image[channel : channel + 1]], boxes, unmirrored(boxes), 20, "bicubic")
        assert (together[:, :, channel].int() - alone[:, :, 0]).abs().max() <= 1


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 30, 22), (3, 50, 40)])
def test_a_crop_does_not_depend_on_the_batch(shape: tuple[int, int, int]) -> None:
    images = noise(40, *shape)
    boxes = boxes_of(40, *shape[1:], (0.1, 1.0), views=2)
    flips = np.random.default_rng(0).random((2, 40)) < 0.5
    together = crop(images, boxes, flips, 16)
    for count in (1, 3, 17):
        pieces = [
            crop(images[i : i + count], boxes[:, i : i + count], flips[:, i : i + count], 16)
            for i in range(0, 40, count)
        ]
        assert torch.equal(torch.cat(pieces, dim=1), together)


@pytest.mark.parametrize("size", [12, 48])
def test_flips_mirror_left_to_right(size: int) -> None:
    images = noise(6, 3, size, size)
    boxes = boxes_of(6, size, size, (0.3, 1.0), views=2)
    flips = np.array([[True, False, True, False, False, True], [False] * 6])
    plain, mirrored = crop(images, boxes, np.zeros_like(flips), 10), crop(images, boxes, flips, 10)
    for view, image in itertools.product(range(2), range(6)):
        expected = plain[view, image].flip(-1) if flips[view, image] else plain[view, image]
        assert torch.equal(mirrored[view, image], expected)
