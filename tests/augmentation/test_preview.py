"""The contact sheet shows every view of every image, in its colours."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino.augmentation import MultiCrop, preview

OFF = {"jitter_probability": 0, "grayscale_probability": 0, "blur_probability": [0, 0, 0], "solarize_probability": 0}

LEFT = (
    4,
    88,
    172,
    228,
)  # of the columns: global views of 40 px shown twice as large, local ones as wide as their label


def sheet_of(channels: int, path: Path, *, photometric: bool = True, num_local_views: int = 2) -> np.ndarray:
    """The sheet of two images, one black in all channels but the first, which is white, and one of mid gray."""
    images = torch.zeros(2, channels, 20, 20, dtype=torch.uint8)
    images[0, 0], images[1] = 255, 128
    mean, std = [0.3] * channels, [0.2] * channels
    views = MultiCrop(
        global_size=40, local_size=16, num_local_views=num_local_views, channels=channels, mean=mean, std=std, **OFF
    )
    batch = views.views(images, np.arange(2), 0, 0)
    preview(views.photometric(batch) if photometric else batch, path, mean, std)
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        return np.array(sheet.convert("RGB"))


@pytest.mark.parametrize("photometric", [True, False])
@pytest.mark.parametrize(
    ("channels", "first"), [(1, (255, 255, 255)), (2, (255,) * 3), (3, (255, 0, 0)), (5, (255, 0, 0))]
)
def test_the_sheet_shows_the_images(
    channels: int, first: tuple[int, int, int], photometric: bool, tmp_path: Path
) -> None:
    sheet = sheet_of(channels, tmp_path / "folder" / "views.png", photometric=photometric)
    columns = len(LEFT)
    middle = [sheet[16 + 4 + row * 84 + 8, left + 8] for row in range(2) for left in LEFT]
    assert {tuple(pixel.tolist()) for pixel in middle[:columns]} == {first}
    assert {tuple(pixel.tolist()) for pixel in middle[columns:]} == {(128, 128, 128)}


def test_every_column_has_a_label(tmp_path: Path) -> None:
    sheet = sheet_of(3, tmp_path / "views.png")
    band = sheet[:16].max(axis=2)
    for left in LEFT:
        assert (band[:, left : left + 50] > 150).any()


def test_without_local_views_there_are_two_columns(tmp_path: Path) -> None:
    wide, narrow = sheet_of(3, tmp_path / "a.png"), sheet_of(3, tmp_path / "b.png", num_local_views=0)
    assert narrow.shape[0] == wide.shape[0]
    assert narrow.shape[1] == 4 + 2 * 84
    assert wide.shape[1] == 4 + 2 * 84 + 2 * 56
