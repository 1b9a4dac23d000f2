"""Well-known sets that torchvision can download.

Shape legend: N images, C channels, H x W pixels.
"""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino.dataset.base import ImageDataset, Splits
from dino.dataset.folders import FileDataset
from dino.dataset.listing import Listing, list_class_folders
from dino.dataset.source import Labels, StackedSource, stacked

IMAGENETTE_FOLDERS = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}
STL10_TRAIN_SPLITS = ("unlabeled", "train+unlabeled", "train")


@dataclass(kw_only=True)
class DownloadableDataset(ImageDataset):
    """A set in memory, read from files that torchvision can download.

    Args:
        root: folder that torchvision calls root: the set has a subfolder of its own there.
        download: fetch the files if they are not there.
    """

    root: str
    download: bool

    files: ClassVar[str]  # what lies below root, for the message when it does not

    def _statistics_folder(self) -> Path | None:
        return self._root()

    def _root(self) -> Path:
        if not self.root:
            raise ValueError(f"dataset.root is needed for dataset={self.name}: set it to where the data are")
        return Path(self.root).expanduser()

    def _original(self, **arguments: bool | str) -> Any:
        """torchvision's own dataset object, of the class that has our name.

        Raises:
            ValueError: the files are missing or broken, or could not be fetched.
        """
        root = self._root()
        if not self.download and not (root / self.files).is_dir():
            raise _missing(root, root / self.files)
        from torchvision import datasets  # here: it takes seconds

        try:
            return getattr(datasets, type(self).__name__)(str(root), download=self.download, **arguments)
        except (RuntimeError, OSError) as error:
            if self.download:
                raise _not_fetched(root / self.files, error) from error
            raise _missing(root, root / self.files) from error

    def _stacked(self, images: Tensor, labels: Labels | None, split: str) -> StackedSource:
        return stacked(images, labels, f"{self.name}/{split}", self.channels)


@dataclass(kw_only=True)
class FashionMNIST(DownloadableDataset):
    """60,000 + 10,000 gray 28x28 images of clothes in 10 classes.

    torchvision downloads the four files; they are read here, also while they are still compressed, which torchvision
    does not do.
    """

    files = "FashionMNIST/raw"

    def _open(self) -> Splits:
        folder = self._root() / self.files
        if not all(_find_idx(folder, name) for split in ("train", "t10k") for name in _idx_names(split)):
            if not self.download:
                raise _missing(self._root(), folder / _idx_names("train")[0])
            self._original()
        train, held_out = self._read(folder, "train"), self._read(folder, "t10k")
        return Splits(train, bank=train, held_out=held_out)

    def _read(self, folder: Path, split: str) -> StackedSource:
        images, labels = (_read_idx(_find_idx(folder, name)) for name in _idx_names(split))
        return self._stacked(torch.from_numpy(images).unsqueeze(1), labels.astype(np.int64), split)


@dataclass(kw_only=True)
class _CIFAR(DownloadableDataset):
    """50,000 + 10,000 colour 32x32 photos."""

    def _open(self) -> Splits:
        train, held_out = self._read(train=True), self._read(train=False)
        return Splits(train, bank=train, held_out=held_out)

    def _read(self, *, train: bool) -> StackedSource:
        original = self._original(train=train)
        images = torch.from_numpy(original.data).permute(0, 3, 1, 2).contiguous()
        return self._stacked(images, np.asarray(original.targets, dtype=np.int64), "train" if train else "test")


@dataclass(kw_only=True)
class CIFAR10(_CIFAR):
    """50,000 + 10,000 colour 32x32 photos in 10 classes."""

    files = "cifar-10-batches-py"


@dataclass(kw_only=True)
class CIFAR100(_CIFAR):
    """50,000 + 10,000 colour 32x32 photos in 100 classes."""

    files = "cifar-100-python"


@dataclass(kw_only=True)
class STL10(DownloadableDataset):
    """Colour 96x96 photos: 100,000 unlabelled, 5,000 + 8,000 labelled in 10 classes.

    Whatever is trained on, the k-NN looks up the labelled training images. In memory the unlabelled split takes 2.8 GB.

    Args:
        train_split: what is trained on: unlabeled, train+unlabeled or train; only the last has labels in training.
    """

    train_split: str

    files = "stl10_binary"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_split not in STL10_TRAIN_SPLITS:
            raise ValueError(
                f"dataset.train_split is {self.train_split!r}; it must be one of {', '.join(STL10_TRAIN_SPLITS)}"
            )

    def _open(self) -> Splits:
        bank, held_out = self._read("train"), self._read("test")
        train = bank if self.train_split == "train" else self._read(self.train_split)
        return Splits(train, bank=bank, held_out=held_out)

    def _read(self, split: str) -> StackedSource:
        original = self._original(split=split)
        labels = None if "unlabeled" in split else np.asarray(original.labels, dtype=np.int64)
        return self._stacked(torch.from_numpy(original.data), labels, split)


@dataclass(kw_only=True)
class Imagenette(FileDataset):
    """About 9,469 + 3,925 photos of ten easy ImageNet classes.

    Args:
        size: full, or 320px or 160px on the short side.
        download: fetch the archive if the folder imagenette2, imagenette2-320 or imagenette2-160 is not in `root`.
    """

    size: str
    download: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size not in IMAGENETTE_FOLDERS:
            raise ValueError(f"dataset.size is {self.size!r}; it must be one of {', '.join(IMAGENETTE_FOLDERS)}")

    def _list(self, root: Path) -> tuple[Listing, Listing | None]:
        return list_class_folders(root, ("train",)), list_class_folders(root, ("val",))

    def _existing_root(self) -> Path:
        root = self._named_root()
        folder = root if root.name == IMAGENETTE_FOLDERS[self.size] else root / IMAGENETTE_FOLDERS[self.size]
        if folder.is_dir():
            return folder
        if not self.download:
            raise _missing(root, folder)
        from torchvision import datasets

        try:
            datasets.Imagenette(str(folder.parent), size=self.size, download=True)
        except (RuntimeError, OSError) as error:
            raise _not_fetched(folder, error) from error
        return folder


def _missing(root: Path, looked_for: Path) -> ValueError:
    return ValueError(
        f"dataset.root={root} does not hold the data (looked for {looked_for}, missing or damaged): "
        f"point it at the right folder, or set dataset.download=true"
    )


def _not_fetched(looked_for: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(f"dataset.download=true could not fetch {looked_for}: {reason}")


def _idx_names(split: str) -> tuple[str, str]:
    return f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"


def _find_idx(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx(path: Path | None) -> NDArray[np.uint8]:
    """An IDX file of bytes (http://yann.lecun.com/exdb/mnist): two zero bytes, type 8, the number of dimensions, their
    sizes as big-endian 32-bit numbers, then the values."""
    assert path is not None
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        header = np.frombuffer(content, dtype=">i4", count=1 + content[3], offset=0)
        if content[:3] != b"\0\0\x08":
            raise ValueError("not an IDX file of bytes")
        values = np.frombuffer(content, dtype=np.uint8, offset=4 * len(header))
        return values.reshape(header[1:]).copy()
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and set dataset.download=true") from error
