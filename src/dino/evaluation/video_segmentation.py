"""Video object segmentation in the layout of DAVIS (original: eval_video_segmentation.py).

Shapes: T frames, M labels (background first), H x W pixels, h x w patches, D features.
"""

import logging
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dino import preemption, ranks
from dino.backbone.base import check_at_least
from dino.dataset.decode import decode_or_explain
from dino.evaluation.attention import patch_features
from dino.evaluation.features import evaluation_mode, normalized
from dino.evaluation.inputs import FeatureInputs, left_out_on_errors
from dino.evaluation.mask_propagation import Propagation, to_pixels
from dino.evaluation.segmentation_scores import sequence_scores

log = logging.getLogger("dino")

NAME = "evaluation.video_segmentation"
LONG_SIDE_MULTIPLE = 64  # the long side is rounded down to it, as in the original [pixels]
VALIDATION = "ImageSets/2017/val.txt"  # names the videos that count, where it is there
VOID = 255  # a label that is neither object nor background


@dataclass(kw_only=True)
class VideoSegmentationEvaluator:
    """Carries the objects of each first frame through its video, and scores the masks: `val/segmentation_j`,
    `val/segmentation_f` and their mean `val/segmentation_jf` [%], means over all objects.

    Below `root` lie `JPEGImages/<resolution>/<video>/*.jpg` and `Annotations/<resolution>/<video>/*.png`, of which the
    480p ones are used where there are several. Videos are those that `ImageSets/2017/val.txt` names, or all. The masks
    are written as `segmentation/<video>/*.png`, with the palette of the given ones, and the scores of every object as
    `segmentation.json`.

    Args:
        every_epochs: period; read by the trainer.
        prefix: what the names of the metrics begin with.
        root: a folder in the layout of DAVIS 2016 or 2017.
        short_side: of the frames, as the network has them [pixels]; the long one is rounded down to 64.
        num_last_frames, radius, top_k, temperature: see `Propagation`.
        max_frames: at most so many of each video; None: all.

    Raises:
        ValueError: for a value out of its range, naming the key.
    """

    every_epochs: int = 100
    prefix: str = "val"
    root: str | None = None
    short_side: int = 480
    num_last_frames: int = 7
    radius: int = 12
    top_k: int = 5
    temperature: float = 0.1
    max_frames: int | None = None

    def __post_init__(self) -> None:
        check_at_least(NAME, 1, every_epochs=self.every_epochs, short_side=self.short_side, top_k=self.top_k)
        check_at_least(NAME, 0, num_last_frames=self.num_last_frames, radius=self.radius)
        if not self.temperature > 0:
            raise ValueError(f"{NAME}.temperature={self.temperature}: use a number above 0, such as the original's 0.1")
        if self.max_frames is not None:
            check_at_least(NAME, 3, max_frames=self.max_frames)  # the first and the last do not count

    def evaluate(self, inputs: FeatureInputs) -> dict[str, float]:
        """Three metrics in percent. Under several ranks each takes some of the videos.

        Raises:
            ValueError: for a folder of another layout, a frame that cannot be read, a backbone without patch tokens.
            Preempted: a signal came to this rank or another.
        """
        if self.root is None:
            raise ValueError(f"{NAME}.root is missing: give a folder in the layout of DAVIS (JPEGImages, Annotations)")
        videos = found_videos(Path(self.root))
        own = videos[ranks.own_part(len(videos))]
        with ranks.alone(), torch.inference_mode(), evaluation_mode(inputs.backbone):
            found = [self._video(inputs, *video) for video in preemption.until_requested(own)]
        preemption.check()
        scores = [score for of_rank in ranks.gather_objects(found) for of_video in of_rank for score in of_video]
        inputs.write("segmentation", {"objects": scores})
        j, f = (100.0 * statistics.mean(score[name] for score in scores) for name in ("j", "f"))
        name = f"{self.prefix}/segmentation"
        return {f"{name}_jf": (j + f) / 2, f"{name}_j": j, f"{name}_f": f}

    def _video(self, inputs: FeatureInputs, frames: Path, masks: Path) -> list[dict[str, Any]]:
        """The scores of each object of a video."""
        truth_files = sorted(masks.glob("*.png"))[: self.max_frames]
        files = [frames / f"{file.stem}.jpg" for file in truth_files]
        truth, palette = read_masks(truth_files)
        log.info("video segmentation: %s, %d frames", masks.name, len(truth))
        height, width = truth.shape[1:]
        patch = inputs.backbone.patch_size
        size = self._size(height, width, patch)
        grid = (size[0] // patch, size[1] // patch)
        labels = np.unique(truth[0][truth[0] != VOID])
        if len(labels) < 2:
            raise ValueError(f"{NAME}.root: the first mask of {masks.name} has no object to follow")
        small = F.interpolate(torch.from_numpy(truth[:1])[None].float(), grid, mode="nearest-exact")[0, 0]  # as PIL
        first = torch.stack([(small == int(label)).float() for label in labels]).to(inputs.device)  # [M, h, w]
        propagation = Propagation(
            num_last_frames=self.num_last_frames, radius=self.radius, top_k=self.top_k, temperature=self.temperature
        )
        predicted = [truth[0]]
        for soft in propagation(self._features(inputs, files, size), first):
            predicted.append(labels[to_pixels(soft, (height, width), patch).cpu().numpy()].astype(np.uint8))
        if inputs.folder is not None:
            folder = inputs.folder / "segmentation" / masks.name
            with left_out_on_errors(folder):
                write_masks(predicted, palette, folder, truth_files)
        return [{"video": masks.name, **score} for score in sequence_scores(np.stack(predicted), truth)]

    def _features(self, inputs: FeatureInputs, files: list[Path], size: tuple[int, int]) -> Iterator[Tensor]:
        """[h, w, D] of each frame."""
        mean, std = inputs.dataset.normalization()
        for file in files:
            image = decode_or_explain(file, inputs.dataset.channels, f"{NAME}.root")
            image = F.interpolate(image[None], size, mode="bilinear", antialias=False, align_corners=False)
            with inputs.autocast():
                features = patch_features(inputs.backbone, normalized(image.to(inputs.device), mean, std))
            yield features[0].float()

    def _size(self, height: int, width: int, patch: int) -> tuple[int, int]:
        """Of frames as the network has them: the short side as it is set, both in whole patches."""
        multiple = max(LONG_SIDE_MULTIPLE, patch)
        short = self.short_side // patch * patch
        if short < multiple:
            raise ValueError(f"{NAME}.short_side={self.short_side}: use at least {multiple}")
        long = max(height, width) * short // min(height, width) // multiple * multiple // patch * patch
        return (short, long) if height <= width else (long, short)


def found_videos(root: Path) -> list[tuple[Path, Path]]:
    """Folders of frames and of masks of each video, in the order of their names.

    Raises:
        ValueError: if there is none.
    """
    resolutions = sorted((root / "Annotations").glob("*"))
    if not resolutions:
        raise ValueError(f"{NAME}.root={root}: has no Annotations/<resolution>/<video>; give one in DAVIS's layout")
    resolution = next((folder for folder in resolutions if folder.name == "480p"), resolutions[0]).name
    masks = sorted(folder for folder in (root / "Annotations" / resolution).glob("*") if folder.is_dir())
    if (chosen := root / VALIDATION).is_file():
        names = chosen.read_text().split()
        masks = [folder for folder in masks if folder.name in names]
    videos = [(root / "JPEGImages" / resolution / folder.name, folder) for folder in masks]
    absent = [frames for frames, _ in videos if not frames.is_dir()]
    if not videos or absent:
        raise ValueError(f"{NAME}.root={root}: there is no {absent[0] if absent else 'video'}")
    short = [folder.name for _, folder in videos if len(list(folder.glob("*.png"))) < 3]
    if short:
        raise ValueError(f"{NAME}.root={root}: {short[0]} has fewer than 3 masks")
    return videos


def read_masks(files: list[Path]) -> tuple[NDArray[np.uint8], list[int] | None]:
    """Labels [T, H, W] and the palette. Masks of one object that are black and white (DAVIS 2016) have label 1.

    Raises:
        ValueError: for a file that cannot be read.
    """
    labels, palette = [], None
    for file in files:
        try:
            with Image.open(file) as image:
                palette = palette or image.getpalette()
                labels.append(np.array(image if image.mode in ("P", "L") else image.convert("L"), dtype=np.uint8))
        except OSError as error:
            raise ValueError(f"{NAME}.root: {file} cannot be read ({error})") from error
    if len({each.shape for each in labels}) > 1:
        raise ValueError(f"{NAME}.root: masks in {files[0].parent} differ in size")
    stacked = np.stack(labels)
    if set(np.unique(stacked[0]).tolist()) <= {0, VOID}:
        stacked = (stacked == VOID).astype(np.uint8)
    return stacked, palette


def write_masks(masks: list[NDArray[np.uint8]], palette: list[int] | None, folder: Path, files: list[Path]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for mask, file in zip(masks, files, strict=True):
        picture = Image.fromarray(mask, mode="P")
        picture.putpalette(palette or [0, 0, 0, 255, 255, 255])
        picture.save(folder / file.name)
