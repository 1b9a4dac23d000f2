"""Handwritten digits that come with scikit-learn: real scans, nothing to download."""

from dataclasses import dataclass

import numpy as np
import torch

from dino.dataset.base import ImageDataset, Splits
from dino.dataset.evaluation_loader import resize_and_cut
from dino.dataset.source import SubsetSource, stacked

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
        from sklearn.datasets import load_digits  # here: it takes about a second
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        labels = digits.target.astype(np.int64)
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # the scans count ink from 0 to 16
        images = resize_and_cut(torch.from_numpy(pixels).unsqueeze(1), self.image_size, self.image_size)
        everything = stacked(images, labels, "digits", self.channels)
        train, held_out = train_test_split(
            np.arange(len(labels)), test_size=NUM_HELD_OUT, stratify=labels, random_state=SPLIT_SEED
        )
        source = SubsetSource(everything, train)
        return Splits(source, bank=source, held_out=SubsetSource(everything, held_out), class_names=tuple("0123456789"))
