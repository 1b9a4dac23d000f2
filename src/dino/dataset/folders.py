"""Datasets of image files: ImageNet, ImageNet-100, and any folder or file list."""

import dataclasses
import hashlib
import logging
import os
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dino.dataset.base import ImageDataset, Splits
from dino.dataset.decode import ChannelMismatch
from dino.dataset.listing import (
    LIST_SUFFIXES,
    Listing,
    as_labels,
    list_class_folders,
    list_folder,
    read_file_list,
    sorted_classes,
)
from dino.dataset.source import FileSource, UnreadableImage

log = logging.getLogger("dino")

HELD_OUT_FOLDERS = ("val", "test")
IMAGENET100_TRAIN = ("train.X1", "train.X2", "train.X3", "train.X4")
IMAGENET100_VAL = "val.X"


@dataclass(kw_only=True)
class FileDataset(ImageDataset):
    """A dataset of image files.

    Args:
        root: folder of the data; see the subclass for what lies in it.
    """

    root: str | None

    def _open(self) -> Splits:
        train, held_out = self._list(self._existing_root())
        listings = (train,) if held_out is None else (train, held_out)
        class_names = sorted_classes([listing.classes for listing in listings if listing.classes is not None])
        sources = [self._source(listing, class_names) for listing in listings]
        self._check_channels(sources[0])
        return Splits(
            sources[0],
            bank=sources[0],
            held_out=sources[1] if held_out is not None else None,
            class_names=class_names or None,
        )

    @abstractmethod
    def _list(self, root: Path) -> tuple[Listing, Listing | None]:
        """The files to train on, and the held-out ones."""

    def _named_root(self) -> Path:
        if not self.root:
            raise ValueError(f"dataset.root is needed for dataset={self.name}: set it to where the images are")
        return Path(self.root).expanduser()

    def _existing_root(self) -> Path:
        root = self._named_root()
        if not root.exists():
            raise ValueError(f"dataset.root={self.root} does not exist: set it to where the images are")
        return root

    def _statistics_folder(self) -> Path | None:
        root = self._existing_root()
        return root if root.is_dir() else root.parent

    def _source(self, listing: Listing, class_names: tuple[str, ...]) -> FileSource:
        labels = None if listing.classes is None else as_labels(listing.classes, class_names)
        return FileSource(listing.paths, labels, self.channels, root=listing.root)

    def _check_channels(self, source: FileSource) -> None:
        """One image tells whether `dataset.channels` is wrong for all; broken files are the loader's affair."""
        try:
            source.read(0)
        except UnreadableImage as error:
            if isinstance(error.__cause__, ChannelMismatch):
                raise ValueError(f"{error}; set dataset.channels to what the files hold") from error


@dataclass(kw_only=True)
class ImageNet(FileDataset):
    """`root` holds the folders train and val, with one folder for each class in both.

    Without val nothing is held out.
    """

    def _list(self, root: Path) -> tuple[Listing, Listing | None]:
        return _class_folder_splits(root, ("train",), "val")


@dataclass(kw_only=True)
class ImageNet100(FileDataset):
    """`root` holds train.X1 to train.X4, joined for training, and val.X, with class folders (the layout on Kaggle)."""

    def _list(self, root: Path) -> tuple[Listing, Listing | None]:
        return _class_folder_splits(root, IMAGENET100_TRAIN, IMAGENET100_VAL)


@dataclass(kw_only=True)
class Folder(FileDataset):
    """Any images: a folder in which they lie at any depth, or a list of files.

    A folder that has train and val (or test) in it is split so; labels are the folders directly below a split if every
    image lies in one. A `.csv` or `.txt` file as `root` is a list of paths with optional labels.

    Args:
        val_fraction: share of the images that is held out, where there is no folder val or test; the same images every
            time, whatever else is in the folder.
    """

    val_fraction: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"dataset.val_fraction is {self.val_fraction}; it must be at least 0 and below 1")

    def _list(self, root: Path) -> tuple[Listing, Listing | None]:
        if root.is_file():
            if root.suffix.lower() not in LIST_SUFFIXES:
                raise ValueError(f"dataset.root={root} is a file, but not a .csv or .txt list of images")
            return self._split_off(read_file_list(root))
        held_out_folder = next((name for name in HELD_OUT_FOLDERS if (root / name).is_dir()), None)
        if not (root / "train").is_dir() or held_out_folder is None:
            return self._split_off(list_folder(root, "train" if _only_train(root) else ""))
        if self.val_fraction > 0:
            raise ValueError(
                f"dataset.val_fraction is {self.val_fraction}, but {root / held_out_folder} is held out already: "
                f"set it to 0"
            )
        return _same_classes(_without_one_class(list_folder(root, "train")), list_folder(root, held_out_folder))

    def _split_off(self, listing: Listing) -> tuple[Listing, Listing | None]:
        listing = _without_one_class(listing)
        if self.val_fraction == 0:
            return listing, None
        if len(listing) < 2:
            raise ValueError(f"dataset.val_fraction is {self.val_fraction}, but there is only {len(listing)} image")
        # By the hash of each path: an image stays on its side when others come or go (but for the rounded count).
        keys = [hashlib.sha256(os.fsencode(str(path))).digest() for path in listing.paths]
        count = min(max(round(self.val_fraction * len(listing)), 1), len(listing) - 1)
        held_out = np.zeros(len(listing), dtype=np.bool_)
        held_out[sorted(range(len(listing)), key=keys.__getitem__)[:count]] = True
        return _choose(listing, ~held_out), _choose(listing, held_out)


def _class_folder_splits(root: Path, train: tuple[str, ...], held_out: str) -> tuple[Listing, Listing | None]:
    missing = [name for name in train if not (root / name).is_dir()]
    if missing:
        raise ValueError(
            f"dataset.root={root} has no folder {' or '.join(missing)}: "
            f"{', '.join(train)} with one folder for each class are expected there"
        )
    training = list_class_folders(root, train)
    if not (root / held_out).is_dir():
        log.warning("dataset.root=%s has no folder %s: nothing is held out", root, held_out)
        return training, None
    testing = list_class_folders(root, (held_out,))
    unknown = _unknown_class(training, testing)
    if unknown is not None:
        raise ValueError(f"dataset.root={root} has the class {unknown} in {held_out}, but not in {', '.join(train)}")
    return training, testing


def _only_train(root: Path) -> bool:
    """Whether `root` has the folder train and no other: then the classes are one level further down."""
    return [path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")] == ["train"]


def _without_one_class(listing: Listing) -> Listing:
    """Without classes if there is only one: a folder that holds everything says nothing about its images."""
    only_one = listing.classes is not None and len(np.unique(listing.classes)) < 2
    return dataclasses.replace(listing, classes=None) if only_one else listing


def _same_classes(train: Listing, held_out: Listing) -> tuple[Listing, Listing]:
    """Both with classes, or both without: a class that training has never seen cannot be scored."""
    if train.classes is None:
        return train, dataclasses.replace(held_out, classes=None)
    reason = "the held-out images have none"
    if held_out.classes is not None:
        unknown = _unknown_class(train, held_out)
        if unknown is None:
            return train, held_out
        reason = f"the held-out class {unknown} is not in the training images"
    log.warning("the labels of %s are not used: %s", train.root, reason)
    return dataclasses.replace(train, classes=None), dataclasses.replace(held_out, classes=None)


def _unknown_class(train: Listing, held_out: Listing) -> str | None:
    assert train.classes is not None
    assert held_out.classes is not None
    return next(iter(sorted(set(held_out.classes.tolist()) - set(train.classes.tolist()))), None)


def _choose(listing: Listing, mask: NDArray[np.bool_]) -> Listing:
    classes = None if listing.classes is None else listing.classes[mask]
    return Listing(listing.root, listing.paths[mask], classes)
