"""Mean and std: computed once, from the training images, and found again."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dino.dataset import Folder, StackedSource
from dino.dataset import statistics as module
from dino.dataset.statistics import FILE_NAME, compute_statistics, stored_statistics

MakeFolder = Callable[..., Folder]
WriteImages = Callable[..., list[Path]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dino"


def test_images_of_one_size_give_the_statistics_of_all_pixels() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 200, (50, 3, 6, 5), dtype=np.uint8))
    statistics = compute_statistics(StackedSource(images, None, "set"))
    pixels = images.double().transpose(0, 1).flatten(1) / 255
    np.testing.assert_allclose(statistics.mean, pixels.mean(1), atol=1e-6)
    np.testing.assert_allclose(statistics.std, pixels.std(1, unbiased=False), atol=1e-6)
    assert statistics.num_images == 50


def test_only_so_many_images_are_read() -> None:
    statistics = compute_statistics(StackedSource(torch.zeros(5000, 1, 1, 1, dtype=torch.uint8), None, "set"))
    assert statistics.num_images == module.MAX_IMAGES
    assert statistics.std == [pytest.approx(1 / 255, abs=1e-6)]  # of a constant, so that nothing is divided by zero


def test_auto_is_computed_once_and_lies_beside_the_data(
    tmp_path: Path, write_images: WriteImages, folder: MakeFolder
) -> None:
    files = write_images(tmp_path / "images", 4)
    first = folder(tmp_path / "images", mean="auto", std=[0.1, 0.2, 0.3]).normalization()
    assert first[1] == [0.1, 0.2, 0.3]
    stored = tmp_path / "images" / FILE_NAME
    (entry,) = json.loads(stored.read_text()).values()
    assert entry["mean"] == first[0]
    assert entry["num_images"] == 4
    written = stored.stat().st_mtime_ns
    for path in files:
        path.write_bytes(b"")  # a second computation could read none of them
    mean, std = folder(tmp_path / "images", mean="auto", std="auto").normalization()
    assert (mean, std) == (entry["mean"], entry["std"])
    assert stored.stat().st_mtime_ns == written


def test_other_images_are_computed_anew_and_both_stay(
    tmp_path: Path, write_images: WriteImages, folder: MakeFolder
) -> None:
    write_images(tmp_path / "images", 4)
    before = folder(tmp_path / "images", mean="auto", std="auto").normalization()
    write_images(tmp_path / "images" / "more", 4, first_seed=10)
    assert folder(tmp_path / "images", mean="auto", std="auto").normalization() != before
    assert len(json.loads((tmp_path / "images" / FILE_NAME).read_text())) == 2


def test_a_folder_that_cannot_be_written_leaves_it_to_the_cache(tmp_path: Path, cache: Path) -> None:
    source = StackedSource(torch.full((3, 1, 2, 2), 51, dtype=torch.uint8), None, "set")
    (tmp_path / "file").touch()
    for unwritable in (tmp_path / "file", None):  # nothing can be written below a file, not even by root
        assert stored_statistics(source, unwritable).mean == [0.2]
    assert len(json.loads((cache / FILE_NAME).read_text())) == 1
    assert [path.name for path in cache.iterdir()] == [FILE_NAME]  # no temporary file stays


def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    source = StackedSource(torch.full((3, 1, 2, 2), 51, dtype=torch.uint8), None, "set")
    (tmp_path / FILE_NAME).write_text("{ half of")
    assert stored_statistics(source, tmp_path).mean == [0.2]
    assert len(json.loads((tmp_path / FILE_NAME).read_text())) == 1


def test_nothing_readable_is_an_error(tmp_path: Path, write_images: WriteImages, folder: MakeFolder) -> None:
    for path in write_images(tmp_path / "images", 2):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"dataset\.mean=auto found no readable image"):
        folder(tmp_path / "images", mean="auto", std="auto").normalization()
