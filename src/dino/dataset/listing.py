"""Finds image files: below a folder, in class folders, or in a list."""

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from dino.dataset.source import Labels

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".npy")
)
LIST_SUFFIXES = (".csv", ".txt")
PATH_COLUMNS = ("path", "file", "filename", "file_name", "image")
LABEL_COLUMNS = ("label", "class", "target")
NUM_PROBED = 10  # listed paths that are looked for at the start


@dataclass(frozen=True)
class Listing:
    """Image files below one folder.

    Attributes:
        paths: [N] relative to `root`, sorted or in the order of the list.
        classes: [N] names of the classes, or None.
    """

    root: Path
    paths: NDArray[np.str_]
    classes: NDArray[np.str_] | None

    def __len__(self) -> int:
        return len(self.paths)


def find_images(root: Path, below: str = "") -> list[str]:
    """Paths relative to `root` of all images in its subfolder `below`, at any depth, sorted.

    Hidden files and folders are left out (macOS leaves `._photo.jpg` beside `photo.jpg`); links are followed, but no
    folder is entered twice.
    """
    return sorted(_walk(root, below, set()))


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not os.path.basename(name).startswith(".")


def list_class_folders(root: Path, splits: Sequence[str]) -> Listing:
    """The images of `splits`, subfolders of `root`; the class is the folder directly below the split.

    Raises:
        ValueError: no image is there, or one lies outside a class folder.
    """
    paths = [path for split in splits for path in find_images(root, split)]
    where = " and ".join(str(root / split) for split in splits)
    if not paths:
        raise ValueError(f"dataset.root={root} has no images in class folders below {where}")
    parts = [PurePosixPath(path).parts for path in paths]
    outside = next((path for path, part in zip(paths, parts, strict=True) if len(part) < 3), None)
    if outside is not None:
        raise ValueError(
            f"dataset.root={root} needs one folder for each class below {where}, but {outside} lies in none: "
            f"sort the images into class folders, or use dataset=folder"
        )
    return Listing(root, np.array(paths), np.array([part[1] for part in parts]))


def list_folder(root: Path, below: str) -> Listing:
    """All images in the subfolder `below` of `root` (all of `root` if empty), at any depth.

    The images have classes if every one lies in a subfolder directly below.

    Raises:
        ValueError: there is no image.
    """
    paths = find_images(root, below)
    if not paths:
        raise ValueError(
            f"dataset.root={root} has no images in {root / below}: looked at any depth for {_extensions()} in any case"
        )
    depth = 2 if below else 1
    parts = [PurePosixPath(path).parts for path in paths]
    if any(len(part) != depth + 1 for part in parts):
        return Listing(root, np.array(paths), None)
    return Listing(root, np.array(paths), np.array([part[depth - 1] for part in parts]))


def read_file_list(path: Path) -> Listing:
    """The images named in a list, relative to its folder.

    A `.csv` has the columns path and, if there are labels, label; a header names them (path, file, filename, image;
    label, class, target), without one they are the first and the second. A `.txt` has one path a line, with an optional
    label behind it (after a tab or a space); lines that start with `#` are left out.

    Raises:
        ValueError: the list is empty, only part of it has labels, or none of its first files exists.
    """
    rows = list(_csv_rows(path) if path.suffix.lower() == ".csv" else _text_rows(path))
    if not rows:
        raise ValueError(f"dataset.root={path} lists no images")
    unlabelled = [name for name, label in rows if label == ""]
    if unlabelled and len(unlabelled) < len(rows):
        raise ValueError(f"dataset.root={path} has labels for some images, but none for {unlabelled[0]}")
    root = path.parent
    probed = [name for name, _ in rows[:NUM_PROBED]]
    if not any((root / name).exists() for name in probed):
        raise ValueError(
            f"dataset.root={path} lists {probed[0]}, but {root / probed[0]} does not exist, "
            f"nor do the next ones: paths count from the folder of the list"
        )
    classes = None if unlabelled else np.array([label for _, label in rows])
    return Listing(root, np.array([name for name, _ in rows]), classes)


def as_labels(classes: NDArray[np.str_], class_names: Sequence[str]) -> Labels:
    """[N] index of every class in `class_names`, which must hold all of them."""
    index = {name: label for label, name in enumerate(class_names)}
    return np.array([index[str(name)] for name in classes], dtype=np.int64)


def sorted_classes(classes: Sequence[NDArray[np.str_]]) -> tuple[str, ...]:
    """The distinct names in all of the arrays; by value if all are whole numbers, so that class 10 follows class 9."""
    names = sorted({str(name) for array in classes for name in np.unique(array)})
    if all(name.isascii() and name.lstrip("-").isdigit() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(names)


def _walk(root: Path, below: str, entered: set[tuple[int, int]]) -> Iterator[str]:
    folder = root / below
    status = folder.stat()
    if (status.st_dev, status.st_ino) in entered:
        return
    entered.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            path = f"{below}/{entry.name}" if below else entry.name
            if entry.is_dir():
                yield from _walk(root, path, entered)
            elif is_image(entry.name):
                yield path


def _csv_rows(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    if not rows:
        return
    header = [cell.strip().lower() for cell in rows[0]]
    path_column, label_column = 0, 1
    if not any(is_image(cell) for cell in header):
        path_column = next((header.index(name) for name in PATH_COLUMNS if name in header), 0)
        # Under a header only a column that is called so holds labels: the second may be anything, a date say.
        label_column = next((header.index(name) for name in LABEL_COLUMNS if name in header), len(header))
        rows = rows[1:]
    for row in rows:
        if len(row) <= path_column:
            raise ValueError(f"dataset.root={path} has a line without a path: {','.join(row)}")
        yield row[path_column].strip(), row[label_column].strip() if len(row) > label_column else ""


def _text_rows(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines():
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if "\t" in text:
            name, label = text.split("\t", 1)
            yield name.strip(), label.strip()
        elif is_image(text) or " " not in text:
            yield text, ""
        else:
            name, label = text.rsplit(maxsplit=1)
            # A name with spaces and without a known extension is taken as a whole.
            yield (name, label) if is_image(name) else (text, "")


def _extensions() -> str:
    return ", ".join(sorted(extension.removeprefix(".") for extension in EXTENSIONS))
