"""Copy detection in the layout of Copydays (original: eval_copy_detection.py).

Shapes: N images, D features, D' = 2 D of a descriptor, C channels, S x S pixels.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dino import preemption, ranks
from dino.backbone import Backbone
from dino.backbone.base import check_at_least
from dino.dataset.decode import decode_or_explain
from dino.dataset.listing import find_images
from dino.evaluation.features import evaluation_mode, normalized
from dino.evaluation.inputs import FeatureInputs
from dino.evaluation.ranking import average_precision, positive_ranks

NAME = "evaluation.copy_detection"
ORIGINAL = "original"
GEM_POWER = 4.0
NUM_FOUND = 20  # of each search
IMAGES_A_COPY = 100  # 200001.jpg and 200017.jpg are copies of 200000.jpg
BATCH = 32
MAX_PAIRS = 2**25  # of tokens in a batch: where attention holds them all, 0.8 GB with 6 heads in float32


@dataclass(kw_only=True)
class CopyDetectionEvaluator:
    """For each altered image, where its original stands among all originals and distractors: `val/copy_<block>_map`
    [%] of each folder of copies in `root`, such as `strong`.

    Descriptors are the class token beside the generalised mean (power 4) of the patch tokens, both of the last block;
    whitened by the principal components of other images where there are some, L2-normalised.

    Args:
        every_epochs: period; read by the trainer.
        prefix: what the names of the metrics begin with.
        root: holds `original/` and one folder or more of copies, named as in Copydays: 200001.jpg is one of 200000.jpg.
        distractors: a folder of images that are nobody's original; None: none.
        whitening: a folder of images that the whitening is learned from; None: no whitening.
        image_size: side that images are brought to, whatever their shape [pixels].
        whitening_power: 0.5 divides by the standard deviation, 0 by nothing.

    Raises:
        ValueError: for a value out of its range, naming the key.
    """

    every_epochs: int = 100
    prefix: str = "val"
    root: str | None = None
    distractors: str | None = None
    whitening: str | None = None
    image_size: int = 320
    whitening_power: float = 0.5

    def __post_init__(self) -> None:
        check_at_least(NAME, 1, every_epochs=self.every_epochs, image_size=self.image_size)

    def evaluate(self, inputs: FeatureInputs) -> dict[str, float]:
        """One metric a folder of copies.

        Raises:
            ValueError: for a folder of another layout, an image that cannot be read, a backbone without patch tokens.
            Preempted: a signal came to this rank or another.
        """
        if self.root is None:
            raise ValueError(f"{NAME}.root is missing: give a folder with original/ and strong/, as Copydays")
        blocks = copydays_blocks(Path(self.root))
        originals = blocks.pop(ORIGINAL)
        number = {group_of(file): place for place, file in enumerate(originals)}
        bank = self._descriptors(inputs, [*originals, *_images(self.distractors, "distractors")])
        whitener = None
        if self.whitening is not None:
            others = self._descriptors(inputs, _images(self.whitening, "whitening"))
            whitener = Whitening.fit(others, self.whitening_power)
        metrics = {}
        for block, files in blocks.items():
            orphans = [file.name for file in files if group_of(file) not in number]
            if orphans:
                raise ValueError(f"{NAME}.root: {block}/{orphans[0]} has no original (the same number, ending in 00)")
            queries = self._descriptors(inputs, files)
            similarity = _unit(queries, whitener) @ _unit(bank, whitener).T
            rankings = similarity.argsort(dim=1, descending=True, stable=True).numpy()
            precisions = [
                average_precision(positive_ranks(ranking[:NUM_FOUND], [number[group_of(file)]]), 1)
                for ranking, file in zip(rankings, files, strict=True)
            ]
            metrics[f"{self.prefix}/copy_{block.replace('/', '_')}_map"] = 100.0 * statistics.mean(precisions)
        return metrics

    def _descriptors(self, inputs: FeatureInputs, files: Sequence[Path]) -> Tensor:
        """[N, D'] on the CPU; every rank computes a part and gets all."""
        mean, std = inputs.dataset.normalization()
        side = self.image_size // inputs.backbone.patch_size  # [patches]
        if side == 0:
            raise ValueError(
                f"{NAME}.image_size={self.image_size}: a patch alone has {inputs.backbone.patch_size} pixels"
            )
        size = side * inputs.backbone.patch_size
        batch = max(1, min(BATCH, MAX_PAIRS // side**4))
        own, rows = files[ranks.own_part(len(files), batch)], list[Tensor]()
        with torch.inference_mode(), evaluation_mode(inputs.backbone):
            for first in preemption.until_requested(range(0, len(own), batch)):
                files_of_batch = own[first : first + batch]
                images = torch.cat([_squeezed(file, inputs.dataset.channels, size) for file in files_of_batch])
                with inputs.autocast():
                    rows.append(descriptors(inputs.backbone, normalized(images.to(inputs.device), mean, std)).cpu())
        preemption.check()
        return ranks.gather_rows(torch.cat(rows) if rows else torch.empty(0))


def descriptors(backbone: Backbone, images: Tensor) -> Tensor:
    """`[N, C, S, S]` -> `[N, D']`: class token, then the generalised mean of the patches, both of the last block.

    Raises:
        ValueError: for a backbone without patch tokens.
    """
    tokens = backbone.intermediate_layers(images, 1)[0].float()
    patches = tokens[:, 1:].clamp(min=1e-6).pow(GEM_POWER).mean(dim=1).pow(1 / GEM_POWER)
    return torch.cat([tokens[:, 0], patches], dim=1)


@dataclass(frozen=True)
class Whitening:
    """Principal directions of descriptors, each divided by its second moment to a power.

    As the original (utils.py, PCA), whose moments are not centered, while what is whitened is.
    """

    mean: Tensor  # [D']
    directions: Tensor  # [D', D']

    @classmethod
    def fit(cls, rows: Tensor, power: float) -> "Whitening":
        """To descriptors [N, D'], in float64."""
        rows = rows.double()
        moments, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        return cls(rows.mean(dim=0), vectors / moments.clamp(min=moments.max() * 1e-5) ** power)

    def __call__(self, rows: Tensor) -> Tensor:
        return (rows.double() - self.mean) @ self.directions


def _unit(rows: Tensor, whitening: Whitening | None) -> Tensor:
    return F.normalize(rows if whitening is None else whitening(rows), dim=1)


def group_of(file: Path) -> int:
    """The image that a file of Copydays is, or is a copy of."""
    return int(file.stem) // IMAGES_A_COPY


def copydays_blocks(root: Path) -> dict[str, list[Path]]:
    """Images by folder, `original` among them; `jpegqual/20` is a folder of its own.

    Raises:
        ValueError: if there are no originals, no copies, or files with names of another kind.
    """
    if not root.is_dir():
        raise ValueError(f"{NAME}.root={root}: there is no such folder")
    blocks: dict[str, list[Path]] = {}
    for name in find_images(root):
        blocks.setdefault(str(Path(name).parent), []).append(root / name)
    if ORIGINAL not in blocks or len(blocks) < 2:
        raise ValueError(f"{NAME}.root={root}: needs original/ and a folder of copies, such as strong/")
    odd = [file.name for files in blocks.values() for file in files if not file.stem.isdecimal()]
    if odd:
        raise ValueError(f"{NAME}.root={root}: {odd[0]} is no name of Copydays, such as 200001.jpg")
    return blocks


def _images(folder: str | None, key: str) -> list[Path]:
    if folder is None:
        return []
    found = [Path(folder) / name for name in find_images(Path(folder))] if Path(folder).is_dir() else []
    if not found:
        raise ValueError(f"{NAME}.{key}={folder}: no images there")
    return found


def _squeezed(file: Path, channels: int, size: int) -> Tensor:
    """uint8 [1, C, S, S]."""
    image = decode_or_explain(file, channels, NAME)
    return F.interpolate(image[None], (size, size), mode="bicubic", antialias=True, align_corners=False)
