"""JPEGs are PIL's, whoever decodes them; and decoded smaller where the crops allow it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dino.augmentation import MultiCrop
from dino.augmentation.crop import scale_boxes
from dino.config import compose, fingerprint
from dino.dataset import FileSource, Folder, TrainLoader, UnreadableImage
from dino.dataset.decode import decode, image_size


def photo(height: int, width: int) -> Image.Image:
    """Smooth shapes with some noise, like a photograph."""
    y, x = np.mgrid[:height, :width] / 40
    waves = np.stack([np.sin(x + y), np.cos(2 * x - y), np.sin(y) * np.cos(x)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 6, waves.shape)
    return Image.fromarray((waves * 90 + 128 + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture
def jpeg(tmp_path: Path) -> Callable[..., Path]:
    """`jpeg(height, width, mode="RGB", **options of PIL)`."""

    def write(height: int = 61, width: int = 83, mode: str = "RGB", **options: Any) -> Path:
        photo(height, width).convert(mode).save(tmp_path / "photo.jpg", **({"quality": 90} | options))
        return tmp_path / "photo.jpg"

    return write


@pytest.mark.parametrize(
    "kind",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"progressive": True},
        {"mode": "L"},
        {"mode": "CMYK"},
        {"keep_rgb": True},
        {"restart_marker_rows": 1},
        {"quality": 20},
        {"height": 1, "width": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_jpeg_reads_as_pil_converts_it(
    jpeg: Callable[..., Path], kind: dict[str, Any], channels: int
) -> None:
    path = jpeg(**kind)
    with Image.open(path) as image:
        expected = np.atleast_3d(np.asarray(image.convert("RGB" if channels == 3 else "L")))
    pixels = decode(path, channels).permute(1, 2, 0).numpy()
    # The same bytes where both have the same libjpeg-turbo; other builds may round an inverse transform differently.
    assert np.abs(pixels.astype(int) - expected).max() <= 2
    assert image_size(path) == pixels.shape[:2]


@pytest.mark.parametrize("trailing", [b"", b"\0\0", b"a trailer"])
def test_bytes_behind_the_image_do_not_matter(jpeg: Callable[..., Path], trailing: bytes) -> None:
    path = jpeg()
    expected = decode(path, 3)
    path.write_bytes(path.read_bytes() + trailing)
    assert torch.equal(decode(path, 3), expected)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("reduction", [1, 2])
@pytest.mark.parametrize("progressive", [True, False])
def test_a_jpeg_that_is_cut_short_is_refused(
    jpeg: Callable[..., Path], kept: float, reduction: int, progressive: bool
) -> None:
    path = jpeg(300, 400, progressive=progressive)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UnreadableImage, match=r"truncated|PIL does not know"):
        FileSource(np.array([str(path)]), None, 3).read(0, reduction)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_reduced_decoding_is_pils_draft(jpeg: Callable[..., Path], mode: str, reduction: int) -> None:
    path = jpeg(203, 317, mode)
    with Image.open(path) as image:
        image.draft(mode, (317 // reduction, 203 // reduction))
        expected = np.asarray(image.convert("RGB"))
    pixels = decode(path, 3, reduction).permute(1, 2, 0).numpy()
    assert pixels.shape == (-(-203 // reduction), -(-317 // reduction), 3)
    assert np.abs(pixels.astype(int) - expected).max() <= 2
    assert image_size(path) == (203, 317)


def test_what_cannot_be_decoded_smaller_is_read_whole(tmp_path: Path) -> None:
    photo(40, 60).save(tmp_path / "photo.png")
    np.save(tmp_path / "array.npy", np.zeros((40, 60, 3), dtype=np.uint8))
    for name in ("photo.png", "array.npy"):
        assert decode(tmp_path / name, 3, 4).shape == (3, 40, 60)
        assert image_size(tmp_path / name) == (40, 60)


# ---------------------------------------------------------------------- scaled decoding in training


@pytest.fixture
def large_photos(tmp_path: Path) -> Path:
    for number in range(6):
        photo(400 + 10 * number, 500).save(tmp_path / f"{number}.jpg", quality=95)
    return tmp_path


def crops(**settings: Any) -> MultiCrop:
    return MultiCrop(**({"global_size": 32, "local_size": 16, "num_local_views": 2} | settings))


def test_scaled_views_are_nearly_the_whole_ones(large_photos: Path, folder: Callable[..., Folder]) -> None:
    """The same boxes, flips and parameters, but for edges that move by up to half a pixel of the view.

    A shift by half a pixel is some levels on these photographs; other crops would be some fifty levels apart.
    """
    whole, scaled = (
        next(TrainLoader(folder(large_photos, batch_size=6, scaled_decoding=on), crops(), seed=0).epoch(0))
        for on in (False, True)
    )
    assert whole.parameters is not None
    assert scaled.parameters is not None
    for name, values in vars(whole.parameters).items():
        assert torch.equal(values, getattr(scaled.parameters, name))
    for name in ("global_views", "local_views"):
        apart = (getattr(whole, name).int() - getattr(scaled, name)).abs().float()
        assert 0 < apart.mean() < 8


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_change_nothing_when_decoding_is_scaled(
    large_photos: Path, folder: Callable[..., Folder], num_workers: int
) -> None:
    def views(workers: int) -> list[torch.Tensor]:
        dataset = folder(large_photos, num_workers=workers, scaled_decoding=True)
        return [batch.global_views for batch in TrainLoader(dataset, crops(), seed=0).epoch(1)]

    assert all(map(torch.equal, views(num_workers), views(0)))


def test_a_batch_of_scaled_images_does_not_change_its_views(large_photos: Path, folder: Callable[..., Folder]) -> None:
    def views(batch_size: int) -> torch.Tensor:
        dataset = folder(large_photos, batch_size=batch_size, scaled_decoding=True)
        return torch.cat([batch.global_views for batch in TrainLoader(dataset, crops(), seed=0).epoch(0)], dim=1)

    assert torch.equal(views(1), views(6))


def test_no_box_becomes_smaller_than_its_view() -> None:
    """Over many draws every reduction happens; the next one would always leave some box too small."""
    augmentation, seen = crops(), set()
    for index in range(200):
        size = (50 + 7 * index, 70 + 6 * index)
        reduction = augmentation.reduction(index, size, seed=0, epoch=3)
        seen.add(reduction)
        boxes, _, _ = augmentation.draw(np.array([index]), np.array(size[:1]), np.array(size[1:]), seed=0, epoch=3)
        sides = boxes[:, 0, 2:].min(axis=1) / np.array([32, 32, 16, 16])
        assert reduction == 1 or sides.min() >= reduction
        assert reduction == 8 or sides.min() < 2 * reduction
    assert seen == {1, 2, 4, 8}


def test_scaled_boxes_lie_inside_and_keep_their_place() -> None:
    boxes = np.array([[[0, 0, 401, 601], [400, 600, 1, 1], [100, 201, 200, 100]]])
    sizes = np.array([[401, 601]] * 3)
    scaled = scale_boxes(boxes, sizes, np.array([[51, 76]] * 3))
    assert scaled[0].tolist() == [[0, 0, 51, 76], [50, 75, 1, 1], [13, 25, 25, 13]]
    assert (scale_boxes(boxes, sizes, sizes) == boxes).all()


def test_scaled_decoding_is_off_and_part_of_the_fingerprint() -> None:
    plain, scaled = compose(["dataset=folder"]), compose(["dataset=folder", "dataset.scaled_decoding=true"])
    assert not plain.dataset.scaled_decoding
    assert fingerprint(plain) != fingerprint(scaled)
