"""Digits, and the sets of torchvision: read from tiny files in torchvision's own layout."""

import gzip
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dino.dataset import CIFAR10, CIFAR100, STL10, Digits, FashionMNIST, ImageDataset, Imagenette
from dino.dataset.digits import stratified_split

SETTINGS: dict[str, Any] = {
    "channels": 3,
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
    "global_size": 32,
    "local_size": 16,
    "evaluation_resize": 32,
    "evaluation_size": 32,
    "batch_size": 4,
    "num_workers": 0,
}
GRAY = SETTINGS | {"channels": 1, "mean": [0.5], "std": [0.25]}
RANDOM = np.random.default_rng(0)


def check_splits(dataset: ImageDataset, num_train: int, num_held_out: int) -> None:
    evaluation = dataset.evaluation()
    assert evaluation is not None
    assert (len(dataset.train()), len(evaluation[1])) == (num_train, num_held_out)
    assert evaluation[0].labels is not None


def test_digits_have_a_fixed_stratified_split() -> None:
    dataset = Digits(name="digits", **GRAY)
    check_splits(dataset, 1437, 360)
    images, labels = dataset.train().images, dataset.train().labels
    assert images is not None
    assert images.shape == (1437, 1, 16, 16)
    assert (images.min().item(), images.max().item()) == (0, 255)
    assert labels is not None
    assert np.bincount(labels).tolist() == [142, 146, 142, 146, 145, 145, 145, 143, 139, 144]
    # The configured mean and std are these.
    pixels = images.double() / 255
    assert pixels.mean().item() == pytest.approx(0.3098, abs=1e-4)
    assert pixels.std(unbiased=False).item() == pytest.approx(0.3476, abs=1e-4)
    assert dataset.num_classes == 10
    assert dataset.train().name(3).startswith("digits[")
    again = Digits(name="digits", **GRAY).train().images
    assert again is not None
    assert torch.equal(again, images)


def test_digits_and_their_split_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    theirs = load_digits()
    dataset = Digits(name="digits", **GRAY | {"image_size": 8})
    evaluation = dataset.evaluation()
    assert evaluation is not None
    indices = train_test_split(np.arange(1797), test_size=360, stratify=theirs.target, random_state=0)
    for source, chosen in zip((dataset.train(), evaluation[1]), indices, strict=True):
        assert source.labels is not None
        assert source.images is not None
        assert source.labels.tolist() == theirs.target[chosen].tolist()
        assert np.array_equal(source.images[:, 0], np.rint(theirs.images[chosen] * (255 / 16)))


@pytest.mark.parametrize(("num_held_out", "seed"), [(11, 5), (100, 3), (355, 9), (900, 2)])
def test_a_stratified_split_is_that_of_scikit_learn(num_held_out: int, seed: int) -> None:
    from sklearn.model_selection import train_test_split

    labels = np.random.RandomState(seed).choice(9, size=1000, p=np.arange(1, 10) / 45)
    theirs = train_test_split(np.arange(1000), test_size=num_held_out, stratify=labels, random_state=seed)
    for ours, expected in zip(stratified_split(labels, num_held_out, seed), theirs, strict=True):
        assert ours.tolist() == expected.tolist()


def test_digits_in_three_channels_repeat_the_gray_values() -> None:
    images = Digits(name="digits", **SETTINGS).train().images
    assert images is not None
    assert images.shape == (1437, 3, 16, 16)
    assert torch.equal(images[:, 0], images[:, 2])
    with pytest.raises(ValueError, match=r"digits cannot be used with dataset\.channels=2"):
        Digits(name="digits", **(SETTINGS | {"channels": 2, "mean": "auto", "std": "auto"})).open()


def test_fashion_mnist_with_the_real_files(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    root = shared_data("fashion_mnist")
    dataset = FashionMNIST(name="fashion_mnist", root=str(root), download=False, **GRAY)
    check_splits(dataset, 60000, 10000)
    images = dataset.train().images
    assert images is not None
    pixels = images.double() / 255
    assert pixels.mean().item() == pytest.approx(0.2860, abs=1e-4)
    assert pixels.std(unbiased=False).item() == pytest.approx(0.3530, abs=1e-4)
    labels = dataset.train().labels
    assert labels is not None
    assert np.bincount(labels).tolist() == [6000] * 10
    assert not (root / ".dino_statistics.json").exists()


def write_idx(path: Path, values: np.ndarray, *, compressed: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">i4").tobytes()
    content = header + values.astype(np.uint8).tobytes()
    Path(f"{path}.gz" if compressed else path).write_bytes(gzip.compress(content) if compressed else content)


@pytest.mark.parametrize("compressed", [True, False])
def test_fashion_mnist_reads_both_forms_of_its_files(tmp_path: Path, compressed: bool) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    expected = RANDOM.integers(0, 256, (5, 28, 28))
    for split, count in (("train", 5), ("t10k", 3)):
        write_idx(raw / f"{split}-images-idx3-ubyte", expected[:count], compressed=compressed)
        write_idx(raw / f"{split}-labels-idx1-ubyte", np.arange(count), compressed=compressed)
    dataset = FashionMNIST(name="fashion_mnist", root=str(tmp_path), download=False, **GRAY)
    check_splits(dataset, 5, 3)
    np.testing.assert_array_equal(dataset.train().read(4)[0].numpy(), expected[4])
    assert dataset.train().labels is not None
    assert dataset.train().labels.tolist() == [0, 1, 2, 3, 4]
    for path in raw.iterdir():
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="is damaged"):
        FashionMNIST(name="fashion_mnist", root=str(tmp_path), download=False, **GRAY).open()


def write_pickle(path: Path, content: dict[str, Any]) -> list[str]:
    """Writes a file of CIFAR's; gives its entry in torchvision's table of checksums."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return [path.name, hashlib.md5(path.read_bytes()).hexdigest()]


@pytest.mark.parametrize(
    ("dataset_class", "folder", "label_key", "batches"),
    [(CIFAR10, "cifar-10-batches-py", "labels", 5), (CIFAR100, "cifar-100-python", "fine_labels", 1)],
)
def test_cifar(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dataset_class: type[CIFAR10],
    folder: str,
    label_key: str,
    batches: int,
) -> None:
    from torchvision import datasets

    original = getattr(datasets, dataset_class.__name__)
    pixels = RANDOM.integers(0, 256, (2, 3 * 32 * 32), dtype=np.uint8)
    content = {"data": pixels, label_key: [3, 7]}
    train = [write_pickle(tmp_path / folder / f"data_batch_{number}", content) for number in range(batches)]
    meta = write_pickle(tmp_path / folder / "meta", {original.meta["key"]: [f"class{number}" for number in range(10)]})
    # torchvision verifies the checksums of the real files; ours take their place.
    monkeypatch.setattr(original, "train_list", train)
    monkeypatch.setattr(original, "test_list", [write_pickle(tmp_path / folder / "test_batch", content)])
    monkeypatch.setattr(original, "meta", original.meta | {"filename": meta[0], "md5": meta[1]})
    dataset = dataset_class(name="cifar", root=str(tmp_path), download=False, **SETTINGS)
    check_splits(dataset, 2 * batches, 2)
    np.testing.assert_array_equal(dataset.train().read(1).numpy(), pixels[1].reshape(3, 32, 32))
    assert dataset.train().labels is not None
    assert dataset.train().labels.tolist() == [3, 7] * batches
    assert dataset.num_classes == 8
    (tmp_path / folder / "test_batch").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"missing or damaged.*dataset\.download=true"):
        dataset_class(name="cifar", root=str(tmp_path), download=False, **SETTINGS).open()


@pytest.mark.parametrize(("train_split", "num_train"), [("unlabeled", 6), ("train+unlabeled", 10), ("train", 4)])
def test_stl10_looks_up_labelled_images_whatever_it_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_split: str, num_train: int
) -> None:
    from torchvision import datasets

    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = {"train": 4, "test": 3, "unlabeled": 6}
    images = {name: RANDOM.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8) for name, count in pixels.items()}
    for name, values in images.items():
        values.transpose(0, 1, 3, 2).tofile(folder / f"{name}_X.bin")  # its files are column by column
        if name != "unlabeled":
            np.arange(1, len(values) + 1, dtype=np.uint8).tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text("airplane\nbird\n")

    def checksums(entries: list[list[str]]) -> list[list[str]]:
        return [[name, hashlib.md5((folder / name).read_bytes()).hexdigest()] for name, _ in entries]

    for table in ("train_list", "test_list"):
        monkeypatch.setattr(datasets.STL10, table, checksums(getattr(datasets.STL10, table)))
    dataset = STL10(name="stl10", root=str(tmp_path), download=False, train_split=train_split, **SETTINGS)
    check_splits(dataset, num_train, 3)
    bank, held_out = dataset.evaluation() or (None, None)
    assert bank is not None
    assert held_out is not None
    assert bank.labels is not None
    assert bank.labels.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(held_out.read(2).numpy(), images["test"][2])
    assert (dataset.train().labels is None) == (train_split != "train")
    assert (bank is dataset.train()) == (train_split == "train")
    last = images["train" if train_split == "train" else "unlabeled"][-1]
    np.testing.assert_array_equal(dataset.train().read(num_train - 1).numpy(), last)


def test_imagenette_finds_the_folder_of_its_size(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    mini = shared_data("imagenette_mini")
    (tmp_path / "imagenette2-160").symlink_to(mini)
    dataset = Imagenette(name="imagenette", root=str(tmp_path), size="160px", download=False, **SETTINGS)
    check_splits(dataset, 1000, 400)
    inside = tmp_path / "imagenette2-160"
    assert (
        len(Imagenette(name="imagenette", root=str(inside), size="160px", download=False, **SETTINGS).train()) == 1000
    )
    with pytest.raises(ValueError, match=r"looked for .*imagenette2-320"):
        Imagenette(name="imagenette", root=str(tmp_path), size="320px", download=False, **SETTINGS).open()


@pytest.mark.parametrize(
    ("dataset_class", "extra", "looked_for"),
    [
        (FashionMNIST, {}, "train-images-idx3-ubyte"),
        (CIFAR10, {}, "cifar-10-batches-py"),
        (CIFAR100, {}, "cifar-100-python"),
        (STL10, {"train_split": "unlabeled"}, "stl10_binary"),
        (Imagenette, {"size": "full"}, "imagenette2"),
    ],
)
def test_missing_data_say_what_was_looked_for_and_how_to_get_it(
    tmp_path: Path, dataset_class: type[CIFAR10], extra: dict[str, str], looked_for: str
) -> None:
    root = tmp_path / "nowhere"
    settings = GRAY if dataset_class is FashionMNIST else SETTINGS
    dataset = dataset_class(name="set", root=str(root), download=False, **extra, **settings)
    with pytest.raises(ValueError, match=rf"dataset\.root={root} .*{looked_for}.*dataset\.download=true"):
        dataset.open()
    assert not root.exists()
    with pytest.raises(ValueError, match=r"dataset\.root is needed"):
        dataset_class(name="set", root=None, download=False, **extra, **settings).open()  # type: ignore[arg-type]


def test_a_download_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    # The place to download from is an address that nothing listens at.
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    dataset = FashionMNIST(name="fashion_mnist", root=str(tmp_path), download=True, **GRAY)
    with pytest.raises(ValueError, match=r"dataset\.download=true could not fetch .*FashionMNIST"):
        dataset.open()


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dataset\.train_split is 'all'.*unlabeled, train\+unlabeled, train"):
        STL10(name="stl10", root="x", download=False, train_split="all", **SETTINGS)
    with pytest.raises(ValueError, match=r"dataset\.size is '64px'.*full, 320px, 160px"):
        Imagenette(name="imagenette", root="x", download=False, size="64px", **SETTINGS)
