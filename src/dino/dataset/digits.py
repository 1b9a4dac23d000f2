"""Handwritten digits that come with scikit-learn: real scans, nothing to download."""

import gzip
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from dino.dataset.base import ImageDataset, Splits
from dino.dataset.evaluation_loader import resize_and_cut
from dino.dataset.source import SubsetSource, stacked

Array = npt.NDArray[np.int64]

NUM_HELD_OUT = 360
SPLIT_SEED = 0


@dataclass(kw_only=True)
class Digits(ImageDataset):
    """1,797 gray 8x8 scans of ten digits (UCI Optical Recognition of Handwritten Digits), of which 360 are held out.

    The split is fixed: stratified by digit, the same in every run.

    Args:
        image_size: the scans are enlarged (bicubic) to this side, so that crops can be finer than the 8 pixels they
            come with. 8 leaves them as they are.
    """

    image_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < 8:
            raise ValueError(f"dataset.image_size={self.image_size}: use at least 8, the size of the scans")

    def _open(self) -> Splits:
        ink, labels = _scans()
        pixels = np.rint(ink * (255 / 16)).astype(np.uint8)  # the scans count ink from 0 to 16
        images = resize_and_cut(torch.from_numpy(pixels).unsqueeze(1), self.image_size, self.image_size)
        everything = stacked(images, labels, "digits", self.channels)
        train, held_out = stratified_split(labels, NUM_HELD_OUT, SPLIT_SEED)
        source = SubsetSource(everything, train)
        return Splits(source, bank=source, held_out=SubsetSource(everything, held_out), class_names=tuple("0123456789"))


# What `load_digits` and `train_test_split` of scikit-learn give, without importing it, which takes seconds.


def _scans() -> tuple[Array, Array]:
    """Ink [1797, 8, 8] from 0 to 16, and the digits [1797], from the file that comes with scikit-learn."""
    package = find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    with gzip.open(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1]


def stratified_split(labels: Array, num_held_out: int, seed: int) -> tuple[Array, Array]:
    """Indices of the two parts, each in a random order, in which every class has its share.

    The same as of `sklearn.model_selection.train_test_split(stratify=labels, random_state=seed)`.
    """
    random = np.random.RandomState(seed)
    counts = np.bincount(labels)
    num_train = _shares(counts, len(labels) - num_held_out, random)
    num_test = _shares(counts - num_train, num_held_out, random)
    parts: tuple[list[Array], list[Array]] = [], []
    for label, count in enumerate(counts):
        mixed = np.flatnonzero(labels == label)[random.permutation(count)]
        parts[0].append(mixed[: num_train[label]])
        parts[1].append(mixed[num_train[label] : num_train[label] + num_test[label]])
    train, held_out = (random.permutation(np.concatenate(part)) for part in parts)
    return train, held_out


def _shares(counts: Array, total: int, random: np.random.RandomState) -> Array:
    """How many of each class make up `total`: in proportion, what is left to the largest remainders, ties by chance."""
    exact = counts / counts.sum() * total
    shares = np.floor(exact)
    remainders = exact - shares
    for remainder in np.unique(remainders)[::-1]:
        left = int(total - shares.sum())
        if left == 0:
            break
        tied = np.flatnonzero(remainders == remainder)
        shares[random.choice(tied, min(len(tied), left), replace=False)] += 1
    counted: Array = shares.astype(np.int64)
    return counted
