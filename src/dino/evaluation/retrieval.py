"""Image retrieval in the layout of the revisited Oxford and Paris benchmarks (original: eval_image_retrieval.py).

Shapes: N images, D features, C channels, H x W pixels.
"""

import logging
import pickle
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dino import preemption, ranks
from dino.backbone import Backbone
from dino.backbone.base import check_at_least
from dino.dataset.decode import decode_or_explain
from dino.evaluation.features import evaluation_mode, normalized
from dino.evaluation.inputs import FeatureInputs
from dino.evaluation.ranking import average_precision, positive_ranks, precision_at

log = logging.getLogger("dino")

NAME = "evaluation.retrieval"
SCALES = (1.0, 2**-0.5, 0.5)  # of `multi_scale`
CUTS = (1, 5, 10)  # of precision
EXTENSION = ".jpg"
# Positives and images left aside of each protocol, as lists of a query's ground truth.
PROTOCOLS = {"medium": (("easy", "hard"), ("junk",)), "hard": (("hard",), ("junk", "easy"))}


@dataclass(kw_only=True)
class RetrievalEvaluator:
    """Ranks all images of a collection for each query by cosine similarity: `val/retrieval_medium_map`,
    `val/retrieval_hard_map`, and `..._mp1`, `_mp5`, `_mp10`, mean precision among the first [%].

    In `root` lie `gnd_<name>.pkl` (a dictionary with `imlist`, `qimlist` and `gnd`, whose entries have `bbx`, `easy`,
    `hard` and `junk`) and `jpg/`. Of the pickle only plain values and arrays are read.

    Args:
        every_epochs: period; read by the trainer.
        prefix: what the names of the metrics begin with.
        root: the folder.
        image_size: the long side is shrunk to it, never enlarged [pixels].
        multi_scale: features are the mean over three sizes.
        crop_queries: to the box of each, as the benchmark says; the original does not.

    Raises:
        ValueError: for a value out of its range, naming the key.
    """

    every_epochs: int = 100
    prefix: str = "val"
    root: str | None = None
    image_size: int = 224
    multi_scale: bool = False
    crop_queries: bool = False

    def __post_init__(self) -> None:
        check_at_least(NAME, 1, every_epochs=self.every_epochs, image_size=self.image_size)

    def evaluate(self, inputs: FeatureInputs) -> dict[str, float]:
        """Metrics in percent; a query without a positive does not count for that protocol.

        Raises:
            ValueError: for a folder of another layout, or an image that cannot be read.
            Preempted: a signal came to this rank or another.
        """
        if self.root is None:
            raise ValueError(f"{NAME}.root is missing: give a folder with gnd_<name>.pkl and jpg/, as roxford5k")
        truth = read_ground_truth(Path(self.root))
        images = [Path(self.root) / "jpg" / f"{name}{EXTENSION}" for name in truth["imlist"]]
        queries = [Path(self.root) / "jpg" / f"{name}{EXTENSION}" for name in truth["qimlist"]]
        bank = self._features(inputs, images, [None] * len(images))
        boxes = [entry.get("bbx") if self.crop_queries else None for entry in truth["gnd"]]
        asked = self._features(inputs, queries, boxes)
        rankings = (asked @ bank.T).argsort(dim=1, descending=True, stable=True).numpy()
        metrics: dict[str, float] = {}
        for protocol, (wanted, ignored) in PROTOCOLS.items():
            metrics |= {
                f"{self.prefix}/retrieval_{protocol}_{name}": value
                for name, value in _scores(rankings, truth["gnd"], wanted, ignored).items()
            }
        return metrics

    def _features(self, inputs: FeatureInputs, files: Sequence[Path], boxes: Sequence[Any]) -> Tensor:
        """[N, D], L2-normalised, on the CPU; every rank computes a part and gets all."""
        own, rows = ranks.own_part(len(files)), list[Tensor]()
        mean, std = inputs.dataset.normalization()
        with torch.inference_mode(), evaluation_mode(inputs.backbone):
            for file, box in preemption.until_requested(zip(files[own], boxes[own], strict=True)):
                image = read_shrunk(file, inputs.dataset.channels, self.image_size, box)
                view = normalized(image[None].to(inputs.device), mean, std)
                with inputs.autocast():
                    features = self._of_view(inputs.backbone, view)
                rows.append(F.normalize(features.float(), dim=-1).cpu())
        preemption.check()
        return ranks.gather_rows(torch.cat(rows) if rows else torch.empty(0))

    def _of_view(self, backbone: Backbone, view: Tensor) -> Tensor:
        """[1, C, H, W] -> [1, D]."""
        scales = SCALES if self.multi_scale else (1.0,)
        sized = [view if s == 1 else F.interpolate(view, scale_factor=s, mode="bilinear") for s in scales]
        patch = backbone.patch_size
        return torch.stack([backbone(in_whole_patches(each, patch)).float() for each in sized]).mean(dim=0)


def _scores(
    rankings: np.ndarray[Any, Any], truth: Sequence[dict[str, Any]], wanted: Sequence[str], ignored: Sequence[str]
) -> dict[str, float]:
    """`map`, `mp1`, `mp5`, `mp10` [%], means over the queries that have positives."""
    precisions: dict[str, list[float]] = {name: [] for name in ("map", *(f"mp{k}" for k in CUTS))}
    for ranking, entry in zip(rankings, truth, strict=True):
        positives = {int(image) for name in wanted for image in entry[name]}
        if positives:
            found = positive_ranks(ranking, positives, {int(image) for name in ignored for image in entry[name]})
            precisions["map"].append(average_precision(found, len(positives)))
            for k in CUTS:
                precisions[f"mp{k}"].append(precision_at(found, k))
    return {name: 100.0 * statistics.mean(values) for name, values in precisions.items() if values}


def in_whole_patches(view: Tensor, patch_size: int) -> Tensor:
    """[..., H, W] without what is left over on the right and below, which a convolution of patches would not see."""
    height, width = (side // patch_size * patch_size for side in view.shape[-2:])
    return view[..., : max(height, patch_size), : max(width, patch_size)]


def read_shrunk(file: Path, channels: int, image_size: int, box: Sequence[float] | None = None) -> Tensor:
    """uint8 [C, H, W], cut to the box (left, top, right, bottom) and shrunk to at most `image_size`.

    Raises:
        ValueError: if it cannot be read.
    """
    image = decode_or_explain(file, channels, f"{NAME}.root")
    picture = Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy())
    if box is not None:
        picture = picture.crop(tuple(box))  # type: ignore[arg-type]  # four numbers, also with fractions
    picture.thumbnail((image_size, image_size), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).copy()).permute(2, 0, 1)


# ---------------------------------------------------------------------- the ground truth


def read_ground_truth(root: Path) -> dict[str, Any]:
    """`imlist`, `qimlist` and `gnd` of the one `gnd_*.pkl` in a folder.

    Raises:
        ValueError: if there is none, or it holds something else.
    """
    if not root.is_dir():
        raise ValueError(f"{NAME}.root={root}: there is no such folder")
    files = sorted(root.glob("gnd_*.pkl"))
    if not files:
        raise ValueError(f"{NAME}.root={root}: has no gnd_<name>.pkl; give a folder like roxford5k of the benchmark")
    try:
        with files[0].open("rb") as file:
            content = _PlainUnpickler(file).load()
        lists = [content[name] for name in ("imlist", "qimlist", "gnd")]
        sound = len(lists[1]) == len(lists[2]) and all({"easy", "hard", "junk"} <= entry.keys() for entry in lists[2])
    except Exception as error:  # pickle's errors have no common base
        raise ValueError(f"{NAME}.root: {files[0]} is not the ground truth of the benchmark ({error})") from error
    if not sound:
        raise ValueError(f"{NAME}.root: {files[0]} lacks easy, hard and junk for every query")
    return dict(content)


class _PlainUnpickler(pickle.Unpickler):
    """Arrays of numbers and plain values; whatever else a pickle would call is refused."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):  # bytes of arrays, in pickles of an older kind
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}")
