"""Evaluation images: as PIL would resize and cut them, in order, with their labels."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino.dataset import EvaluationLoader, FileSource, Folder, StackedSource, SubsetSource


def pil_square(path: Path, resize: int, size: int) -> np.ndarray:
    """Resize(resize, bicubic) and CenterCrop(size), written with PIL."""
    image = Image.open(path).convert("RGB")
    short = min(image.size)
    width, height = (int(resize * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize(("height", "width"), [(80, 57), (57, 80), (40, 40), (13, 30)])
def test_files_are_resized_as_pil_does(
    tmp_path: Path, write_image: Callable[..., Path], height: int, width: int
) -> None:
    path = write_image(tmp_path / "a.png", height, width)
    ((images, labels),) = EvaluationLoader(FileSource(np.array([str(path)]), None, 3), 28, 32, 4, 0)
    assert images.shape == (1, 3, 28, 28)
    assert images.dtype == torch.uint8
    assert labels is None
    difference = images[0].permute(1, 2, 0).numpy().astype(int) - pil_square(path, 32, 28)
    assert np.abs(difference).max() <= 1
    assert np.abs(difference).mean() < 0.05


def test_photos_are_resized_as_pil_does(shared_data: Callable[[str], Path]) -> None:
    paths = sorted((shared_data("imagenette_mini") / "val").rglob("*.JPEG"))[::100]
    source = FileSource(np.array([str(path) for path in paths]), np.arange(len(paths)), 3)
    images = torch.cat([images for images, _ in EvaluationLoader(source, 112, 128, 2, 0)])
    for image, path in zip(images, paths, strict=True):
        difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - pil_square(path, 128, 112))
        assert difference.max() <= 1
        assert difference.mean() < 0.05


def test_images_in_memory_come_in_order_with_labels() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (10, 1, 8, 8), dtype=np.uint8))
    source = SubsetSource(StackedSource(images, np.arange(10), "set"), np.arange(9, -1, -1))
    loader = EvaluationLoader(source, 8, 8, 4, 0)
    batches = list(loader)
    assert [len(images) for images, _ in batches] == [4, 4, 2]
    assert len(loader) == 3
    assert torch.equal(torch.cat([images for images, _ in batches]), images.flip(0))
    assert torch.cat([labels for _, labels in batches if labels is not None]).tolist() == list(range(9, -1, -1))


def test_workers_and_batch_size_change_nothing(
    tmp_path: Path, write_images: Callable[..., list[Path]], folder: Callable[..., Folder]
) -> None:
    write_images(tmp_path, 7)
    source = folder(tmp_path).train()
    reference = torch.cat([images for images, _ in EvaluationLoader(source, 16, 20, 7, 0)])
    for batch_size, num_workers in ((2, 0), (3, 2)):
        made = torch.cat([images for images, _ in EvaluationLoader(source, 16, 20, batch_size, num_workers)])
        assert torch.equal(made, reference)


def test_an_unreadable_image_is_left_out_with_its_label(
    tmp_path: Path,
    write_images: Callable[..., list[Path]],
    truncate: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    paths = write_images(tmp_path, 5, ".jpg")
    truncate(paths[2])
    source = FileSource(np.array([str(path) for path in paths]), np.arange(5), 3)
    with caplog.at_level(logging.WARNING, logger="dino"):
        batches = list(EvaluationLoader(source, 16, 16, 1, 0))
    assert [labels.tolist() for _, labels in batches if labels is not None] == [[0], [1], [3], [4]]
    assert str(paths[2]) in caplog.text
