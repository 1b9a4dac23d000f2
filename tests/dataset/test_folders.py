"""Folders in every shape that people have, and file lists."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dino.dataset import FileSource, Folder, ImageDataset, ImageNet, ImageNet100, Source

SIZES = {
    "channels": 3,
    "mean": [0.5] * 3,
    "std": [0.2] * 3,
    "global_size": 16,
    "local_size": 8,
    "evaluation_resize": 16,
    "evaluation_size": 16,
    "batch_size": 2,
    "num_workers": 0,
}
Write = Callable[..., Path]
MakeFolder = Callable[..., Folder]


def names(source: Source, root: Path) -> list[str]:
    return [str(Path(source.name(index)).relative_to(root)) for index in range(len(source))]


def held_out(dataset: ImageDataset) -> Source:
    evaluation = dataset.evaluation()
    assert evaluation is not None
    return evaluation[1]


def labels(source: Source) -> list[int]:
    assert source.labels is not None
    return list(source.labels.tolist())


def test_a_flat_folder_with_extensions_in_any_case(tmp_path: Path, write_image: Write, folder: MakeFolder) -> None:
    for name in ("b.JPG", "a.png", "c.Jpeg", "d.TIF"):
        write_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._a.png").write_text("left by macOS")
    dataset = folder(tmp_path)
    assert names(dataset.train(), tmp_path) == ["a.png", "b.JPG", "c.Jpeg", "d.TIF"]
    assert dataset.train().labels is None
    assert dataset.num_classes is None
    assert dataset.evaluation() is None
    assert all(dataset.train().read(index).shape == (3, 20, 24) for index in range(4))


def test_any_nesting_has_no_labels(tmp_path: Path, write_image: Write, folder: MakeFolder) -> None:
    for name in ("2024/may/a.png", "2024/june/deep/b.png", "c.png"):
        write_image(tmp_path / name)
    dataset = folder(tmp_path)
    assert names(dataset.train(), tmp_path) == ["2024/june/deep/b.png", "2024/may/a.png", "c.png"]
    assert dataset.train().labels is None


def test_class_folders_give_labels(tmp_path: Path, write_image: Write, folder: MakeFolder) -> None:
    for name in ("10/a.png", "9/b.png", "9/c.png"):
        write_image(tmp_path / name)
    dataset = folder(tmp_path)
    assert dataset.class_names == ("9", "10")
    assert labels(dataset.train()) == [1, 0, 0]
    assert dataset.num_classes == 2


def test_one_class_folder_is_no_label(tmp_path: Path, write_image: Write, folder: MakeFolder) -> None:
    write_image(tmp_path / "all" / "a.png")
    assert folder(tmp_path).num_classes is None


@pytest.mark.parametrize("other", ["val", "test"])
def test_train_and_a_held_out_folder(tmp_path: Path, write_image: Write, folder: MakeFolder, other: str) -> None:
    for name in ("train/cat/a.png", "train/dog/b.png", f"{other}/dog/c.png"):
        write_image(tmp_path / name)
    dataset = folder(tmp_path)
    assert names(dataset.train(), tmp_path) == ["train/cat/a.png", "train/dog/b.png"]
    assert names(held_out(dataset), tmp_path) == [f"{other}/dog/c.png"]
    assert labels(held_out(dataset)) == [1]
    with pytest.raises(ValueError, match=rf"dataset.val_fraction is 0.5, but .*{other} is held out already"):
        folder(tmp_path, val_fraction=0.5).open()


def test_a_class_with_one_image_keeps_its_number_when_that_image_is_held_out(
    tmp_path: Path, write_images: Callable[..., list[Path]], folder: MakeFolder
) -> None:
    for name in "abcdefgh":
        write_images(tmp_path / name, 1)
    dataset = folder(tmp_path, val_fraction=0.5)
    assert dataset.class_names == tuple("abcdefgh")
    for source in (dataset.train(), held_out(dataset)):
        assert ["abcdefgh"[label] for label in labels(source)] == [name[0] for name in names(source, tmp_path)]


def test_train_alone_is_a_split_and_its_folders_are_the_classes(
    tmp_path: Path, write_image: Write, folder: MakeFolder
) -> None:
    for name in ("train/cat/a.png", "train/dog/b.png"):
        write_image(tmp_path / name)
    assert folder(tmp_path).class_names == ("cat", "dog")


def test_a_class_that_is_called_train_is_a_class(tmp_path: Path, write_image: Write, folder: MakeFolder) -> None:
    for name in ("train/a.png", "boat/b.png"):
        write_image(tmp_path / name)
    assert folder(tmp_path).class_names == ("boat", "train")


def test_labels_that_do_not_fit_together_are_left_out(tmp_path: Path, write_image: Write, folder: MakeFolder) -> None:
    for name in ("train/cat/a.png", "train/dog/b.png", "val/bird/c.png", "val/dog/d.png"):
        write_image(tmp_path / name)
    dataset = folder(tmp_path)
    assert dataset.train().labels is None
    assert held_out(dataset).labels is None
    assert len(held_out(dataset)) == 2


def test_val_fraction_holds_out_the_same_images_whatever_joins_them(
    tmp_path: Path, write_images: Callable[..., list[Path]], folder: MakeFolder
) -> None:
    write_images(tmp_path / "a", 20)
    write_images(tmp_path / "b", 20)
    first = folder(tmp_path, val_fraction=0.25)
    assert len(held_out(first)) == 10
    assert len(first.train()) == 30
    chosen = set(names(held_out(first), tmp_path))
    assert chosen.isdisjoint(names(first.train(), tmp_path))
    assert set(names(held_out(folder(tmp_path, val_fraction=0.25)), tmp_path)) == chosen
    write_images(tmp_path / "c", 4)
    later = set(names(held_out(folder(tmp_path, val_fraction=10 / 44)), tmp_path))
    assert len(later & chosen) >= 6  # at most those that the four new ones displace


def test_a_linked_folder_is_followed_and_a_circle_is_not(
    tmp_path: Path, write_image: Write, folder: MakeFolder
) -> None:
    write_image(tmp_path / "elsewhere" / "a.png")
    root = tmp_path / "root"
    write_image(root / "b.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "circle").symlink_to(root)
    assert names(folder(root).train(), root) == ["b.png", "linked/a.png"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("path,label\nx/a b.png,dog\nc.png,cat\n", [1, 0]),
        ("label,date,filename\n10,may,x/a b.png\n9,june,c.png\n", [1, 0]),
        ("x/a b.png,3\nc.png,1\n", [1, 0]),
        ("path,date\nx/a b.png,2024\nc.png,2025\n", None),
        ("x/a b.png\nc.png\n", None),
    ],
)
def test_a_csv_list(
    tmp_path: Path, write_image: Write, folder: MakeFolder, content: str, expected: list[int] | None
) -> None:
    write_image(tmp_path / "x" / "a b.png")
    write_image(tmp_path / "c.png")
    write_image(tmp_path / "not_listed.png")
    (tmp_path / "list.csv").write_text(content)
    source = folder(tmp_path / "list.csv").train()
    assert names(source, tmp_path) == ["x/a b.png", "c.png"]
    assert (None if source.labels is None else labels(source)) == expected
    assert source.read(0).shape == (3, 20, 24)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("# mine\nx/a b.png dog\n\nc.png cat\n", [1, 0]),
        ("x/a b.png\tdog\nc.png\tcat\n", [1, 0]),
        ("x/a b.png\nc.png", None),
    ],
)
def test_a_text_list(
    tmp_path: Path, write_image: Write, folder: MakeFolder, content: str, expected: list[int] | None
) -> None:
    write_image(tmp_path / "x" / "a b.png")
    write_image(tmp_path / "c.png")
    (tmp_path / "list.txt").write_text(content)
    source = folder(tmp_path / "list.txt").train()
    assert names(source, tmp_path) == ["x/a b.png", "c.png"]
    assert (None if source.labels is None else labels(source)) == expected


def test_bad_lists_and_roots_are_named(tmp_path: Path, write_image: Write, folder: MakeFolder) -> None:
    write_image(tmp_path / "a.png")
    lists = {
        "empty.txt": ("# nothing\n", "lists no images"),
        "half.csv": ("path,label\na.png,1\nb.png,\n", "none for b.png"),
        "wrong.txt": ("nowhere/a.png\nnowhere/b.png\n", "does not exist"),
    }
    for name, (content, message) in lists.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            folder(tmp_path / name).open()
    with pytest.raises(ValueError, match=r"dataset\.root is needed"):
        folder(None).open()
    with pytest.raises(ValueError, match=r"dataset.root=.*nowhere does not exist"):
        folder(tmp_path / "nowhere").open()
    with pytest.raises(ValueError, match=r"not a .csv or .txt list"):
        folder(tmp_path / "a.png").open()
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"dataset.root=.*bare has no images"):
        folder(tmp_path / "bare").open()


def test_class_folders_of_imagenet(tmp_path: Path, write_image: Write) -> None:
    for name in ("train/n01/a.JPEG", "train/n02/b.JPEG", "train/n02/c.JPEG", "val/n02/d.JPEG"):
        write_image(tmp_path / name)
    dataset = ImageNet(name="imagenet", root=str(tmp_path), **SIZES)
    assert labels(dataset.train()) == [0, 1, 1]
    assert labels(held_out(dataset)) == [1]
    assert dataset.class_names == ("n01", "n02")
    write_image(tmp_path / "val" / "n03" / "e.JPEG")
    with pytest.raises(ValueError, match="class n03 in val"):
        ImageNet(name="imagenet", root=str(tmp_path), **SIZES).open()


def test_unsorted_validation_images_of_imagenet_are_refused(tmp_path: Path, write_image: Write) -> None:
    for name in ("train/n01/a.JPEG", "val/ILSVRC2012_val_00000001.JPEG"):
        write_image(tmp_path / name)
    with pytest.raises(ValueError, match="one folder for each class"):
        ImageNet(name="imagenet", root=str(tmp_path), **SIZES).open()


def test_imagenet100_joins_its_four_parts(tmp_path: Path, write_image: Write) -> None:
    for name in ("train.X1/n04/a.JPEG", "train.X2/n01/b.JPEG", "train.X3/n03/c.JPEG", "val.X/n04/e.JPEG"):
        write_image(tmp_path / name)
    with pytest.raises(ValueError, match=r"no folder train\.X4"):
        ImageNet100(name="imagenet100", root=str(tmp_path), **SIZES).open()
    write_image(tmp_path / "train.X4" / "n02" / "d.JPEG")
    dataset = ImageNet100(name="imagenet100", root=str(tmp_path), **SIZES)
    assert labels(dataset.train()) == [3, 0, 2, 1]
    assert dataset.class_names == ("n01", "n02", "n03", "n04")
    assert labels(held_out(dataset)) == [3]


def test_wrong_number_of_channels_is_told_before_training(
    tmp_path: Path, write_image: Write, folder: MakeFolder
) -> None:
    write_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png: it has 3 channels, not dataset.channels=5; set dataset.channels"):
        folder(tmp_path, channels=5, mean="auto", std="auto").open()


def test_settings_that_cannot_be_right(tmp_path: Path, folder: MakeFolder) -> None:
    wrong: dict[str, object] = {
        "batch_size": 0,
        "num_workers": -1,
        "max_bad_fraction": 1.5,
        "evaluation_resize": 15,
        "mean": [0.5],
        "std": [0.5, 0.5, 0.0],
        "val_fraction": 1.0,
        "channels": 1,
        "global_size": 0,
    }
    for key, value in wrong.items():
        with pytest.raises(ValueError, match=r"dataset\."):
            folder(tmp_path, **{key: value})
    with pytest.raises(ValueError, match="must be auto or a list of 3 numbers"):
        folder(tmp_path, mean="automatic")


def test_photos_in_class_folders(shared_data: Callable[[str], Path], folder: MakeFolder) -> None:
    root = shared_data("imagenette_mini")
    for dataset in (folder(root), ImageNet(name="imagenet", root=str(root), **SIZES)):
        assert (len(dataset.train()), len(held_out(dataset))) == (1000, 400)
        assert dataset.num_classes == 10
        assert {labels(dataset.train()).count(label) for label in range(10)} == {100}
        assert isinstance(dataset.train(), FileSource)
        assert all(dataset.train().read(index).shape == (3, 224, 224) for index in range(0, 1000, 100))
