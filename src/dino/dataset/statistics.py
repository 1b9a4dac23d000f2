"""Mean and standard deviation of the training pixels, computed once and stored.

Shape legend: C channels, H x W pixels.
"""

import contextlib
import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dino.dataset.source import Source, UnreadableImage, spread_indices

log = logging.getLogger("dino")

MAX_IMAGES = 2000  # ample for two digits of a mean; more would only delay the first start
FILE_NAME = ".dino_statistics.json"
SMALLEST_STD = 1 / 255  # a constant channel would otherwise divide by zero


@dataclass(frozen=True)
class PixelStatistics:
    """Per channel, of pixels in 0..1: `mean` and `std` [C], from `num_images` images."""

    mean: list[float]
    std: list[float]
    num_images: int


def compute_statistics(source: Source) -> PixelStatistics:
    """Statistics of at most `MAX_IMAGES` evenly spaced images; every image weighs the same, whatever its size.

    Raises:
        ValueError: none of these images can be read.
    """
    first, second = [], []
    failure: UnreadableImage | None = None
    for index in spread_indices(len(source), MAX_IMAGES):
        try:
            image = source.read(int(index))
        except UnreadableImage as error:
            failure = error
            continue
        pixels = image.flatten(1).to(torch.float64) / 255
        first.append(pixels.mean(1))
        second.append(pixels.square().mean(1))
    if not first:
        raise ValueError(f"dataset.mean=auto found no readable image; the last was {failure}")
    mean = torch.stack(first).mean(0)
    std = (torch.stack(second).mean(0) - mean.square()).clamp_min(0).sqrt().clamp_min(SMALLEST_STD)
    rounded = [[round(value, 6) for value in values.tolist()] for values in (mean, std)]
    return PixelStatistics(rounded[0], rounded[1], len(first))


def stored_statistics(source: Source, folder: Path | None) -> PixelStatistics:
    """The statistics of `source`: read where an earlier run left them, otherwise computed and stored.

    They lie in `.dino_statistics.json` in `folder` (beside the data), or in the user's cache folder when `folder` is
    None or cannot be written; entries are keyed by the fingerprint of the source.
    """
    key = source.fingerprint()
    places = [place for place in (folder, cache_folder()) if place is not None]
    for place in places:
        entry = _entries(place / FILE_NAME).get(key)
        if entry is not None:
            with contextlib.suppress(TypeError):  # written by another version: computed anew
                return PixelStatistics(**entry)
    statistics = compute_statistics(source)
    for place in places:
        if _store(place / FILE_NAME, key, statistics):
            log.info(
                "mean %s and std %s of %d training images, stored in %s",
                statistics.mean,
                statistics.std,
                statistics.num_images,
                place / FILE_NAME,
            )
            break
    return statistics


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/dino`, by default `~/.cache/dino`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dino"


def _entries(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _store(path: Path, key: str, statistics: PixelStatistics) -> bool:
    """Adds an entry; the file is replaced in one move, so that runs that start together cannot break it."""
    entries = _entries(path) | {key: asdict(statistics)}
    temporary: str | None = None
    try:
        if path.parent == cache_folder():
            path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=FILE_NAME, dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(entries, file, indent=2)
        os.chmod(temporary, 0o644)  # mkstemp's own mode would hide it from colleagues who share the data
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        return False
    return True
