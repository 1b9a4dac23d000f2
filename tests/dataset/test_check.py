"""What `dino data check` finds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from dino.dataset import Folder, ImageDataset, Splits, StackedSource, check


def test_everything_that_is_there_is_reported(
    tmp_path: Path,
    write_image: Callable[..., Path],
    truncate: Callable[[Path], None],
    folder: Callable[..., Folder],
) -> None:
    for number in range(6):
        write_image(tmp_path / "train" / "cat" / f"{number}.png", 20 + number, 30, number)
    write_image(tmp_path / "train" / "dog" / "a.jpg", 64, 64)
    truncate(tmp_path / "train" / "dog" / "a.jpg")
    write_image(tmp_path / "val" / "dog" / "b.png", 10, 12, 50)
    Image.open(tmp_path / "train" / "cat" / "1.png").convert("L").save(tmp_path / "val" / "dog" / "gray.png")
    shutil.copy(tmp_path / "train" / "cat" / "0.png", tmp_path / "train" / "cat" / "copy.png")
    Image.open(tmp_path / "train" / "cat" / "2.png").save(tmp_path / "val" / "cat.bmp")
    (tmp_path / "val" / "cat").mkdir()
    (tmp_path / "val" / "cat.bmp").rename(tmp_path / "val" / "cat" / "other_format.bmp")

    report = check(folder(tmp_path), global_batch_size=3)
    train, held_out = report.splits["train"], report.splits["held-out"]
    assert (train.num_images, held_out.num_images) == (8, 3)
    assert train.num_per_class == {"cat": 7, "dog": 1}
    assert held_out.num_per_class == {"cat": 1, "dog": 2}
    assert train.sizes == {"min": (30, 20), "median": (30, 22), "max": (30, 25)}
    assert train.modes == {"RGB": 7}
    assert held_out.modes == {"RGB": 2, "L": 1}
    ((name, reason),) = train.unreadable
    assert name == str(tmp_path / "train" / "dog" / "a.jpg")
    assert "truncated" in reason
    assert report.num_unreadable == 1
    cat = tmp_path / "train" / "cat"
    assert report.duplicates_within == {"train": [[str(cat / "0.png"), str(cat / "copy.png")]], "held-out": []}
    assert report.duplicates_across == [[str(cat / "2.png"), str(tmp_path / "val" / "cat" / "other_format.bmp")]]
    assert report.steps_per_epoch == 2
    assert json.loads(json.dumps(report.to_dict()))["steps_per_epoch"] == 2
    table = dict(report.rows())
    assert table["train: images"] == "8"
    assert "a.jpg" in table["train: unreadable"]
    assert "other_format.bmp" in table["duplicates across splits"]
    assert table["held-out: exact duplicates"] == "none"


def test_a_batch_that_is_too_large_is_reported_not_refused(
    tmp_path: Path, write_image: Callable[..., Path], folder: Callable[..., Folder]
) -> None:
    write_image(tmp_path / "a.png")
    report = check(folder(tmp_path), global_batch_size=2)
    assert report.steps_per_epoch == 0
    assert "too large" in dict(report.rows())["steps per epoch"]
    assert report.splits["train"].num_per_class is None


def test_a_separate_bank_is_a_split_of_its_own() -> None:
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1)

    class Unlabelled(ImageDataset):
        def _open(self) -> Splits:
            parts = [StackedSource(images[start : start + 2], None, f"part{start}") for start in (0, 2, 4)]
            return Splits(parts[0], bank=parts[1], held_out=parts[2])

    dataset = Unlabelled(
        name="set",
        channels=1,
        mean=[0.5],
        std=[0.5],
        global_size=4,
        local_size=4,
        evaluation_resize=4,
        evaluation_size=4,
        batch_size=1,
        num_workers=0,
    )
    report = check(dataset, global_batch_size=1)
    assert list(report.splits) == ["train", "bank", "held-out"]
    assert report.duplicates_across == []
