"""Looks at every image of a dataset and says what is there: `dino data check`."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dino.dataset.base import ImageDataset
from dino.dataset.source import Source, UnreadableImage

NUM_SHOWN = 5  # examples in a row of the table; `to_dict` has all
CHUNK = 1024  # images in flight at a time, so that millions of results do not wait in memory


@dataclass(frozen=True)
class SplitReport:
    """One split.

    Attributes:
        num_per_class: images of every class, by name where names are known; None without labels.
        sizes: smallest, median and largest (width, height) in pixels, each side by itself; None if nothing is readable.
        modes: how many images are stored as RGB, L, I;16 ...
        unreadable: (name, reason) of every image that cannot be read.
    """

    num_images: int
    num_per_class: dict[str, int] | None
    sizes: dict[str, tuple[int, int]] | None
    modes: dict[str, int]
    unreadable: list[tuple[str, str]]


@dataclass(frozen=True)
class DatasetReport:
    """What `check` found.

    Attributes:
        splits: by name: train, held-out, and bank if the k-NN looks up other images than those trained on.
        duplicates_within: groups of names that show exactly the same pixels in one split, by split.
        duplicates_across: groups of names that do so in different splits: held-out images seen in training.
        steps_per_epoch: with `global_batch_size`; 0 means that training would refuse to start.
    """

    name: str
    splits: dict[str, SplitReport]
    duplicates_within: dict[str, list[list[str]]]
    duplicates_across: list[list[str]]
    global_batch_size: int
    steps_per_epoch: int

    @property
    def num_unreadable(self) -> int:
        return sum(len(split.unreadable) for split in self.splits.values())

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON knows."""
        return asdict(self) | {"num_unreadable": self.num_unreadable}

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) for a table; long lists are cut."""
        rows = [("dataset", self.name)]
        for name, split in self.splits.items():
            rows += [(f"{name}: {what}", value) for what, value in _split_rows(split)]
            rows.append((f"{name}: exact duplicates", _groups(self.duplicates_within[name])))
        if len(self.splits) > 1:
            rows.append(("duplicates across splits", _groups(self.duplicates_across)))
        steps = f"{self.steps_per_epoch} of {self.global_batch_size} images"
        rows.append(("steps per epoch", steps if self.steps_per_epoch else f"{steps}: the batch is too large"))
        return rows


def check(dataset: ImageDataset, global_batch_size: int) -> DatasetReport:
    """Reads every image once, files with several threads.

    Duplicates are found by a hash of the decoded pixels, so that a copy in another lossless format counts too.

    Args:
        dataset: any dataset.
        global_batch_size: images of one optimizer step, over all processes and accumulated batches.
    """
    train = dataset.train()
    sources = {"train": train}
    evaluation = dataset.evaluation()
    if evaluation is not None:
        bank, held_out = evaluation
        if bank is not train:
            sources["bank"] = bank
        sources["held-out"] = held_out
    splits, found = {}, defaultdict(list)
    for name, source in sources.items():
        inspected = list(_inspect_all(source))
        splits[name] = _split_report(source, inspected, dataset.class_names)
        for index, image in enumerate(inspected):
            if image.digest is not None:
                found[image.digest].append((name, source.name(index)))
    groups = [group for group in found.values() if len(group) > 1]
    within: dict[str, list[list[str]]] = {
        name: [members for group in groups if len(members := [image for split, image in group if split == name]) > 1]
        for name in sources
    }
    across = [[image for _, image in group] for group in groups if len({split for split, _ in group}) > 1]
    return DatasetReport(
        dataset.name, splits, within, across, global_batch_size, len(train) // max(global_batch_size, 1)
    )


@dataclass(frozen=True)
class _Inspected:
    mode: str = ""
    width: int = 0
    height: int = 0
    digest: bytes | None = None
    failure: UnreadableImage | None = None


def _inspect_all(source: Source) -> Iterator[_Inspected]:
    if source.images is not None:
        yield from (_inspect(source, index) for index in range(len(source)))
        return
    with ThreadPoolExecutor(max_workers=min(32, 2 * (os.cpu_count() or 1))) as pool:
        for start in range(0, len(source), CHUNK):
            indices = range(start, min(start + CHUNK, len(source)))
            yield from pool.map(lambda index: _inspect(source, index), indices)


def _inspect(source: Source, index: int) -> _Inspected:
    try:
        pixels = source.read(index)
    except UnreadableImage as error:
        return _Inspected(failure=error)
    height, width = pixels.shape[-2:]
    digest = hashlib.blake2b(f"{height} {width} ".encode(), digest_size=16)
    digest.update(pixels.contiguous().numpy().tobytes())
    return _Inspected(source.mode(index), width, height, digest.digest())


def _split_report(source: Source, images: list[_Inspected], class_names: tuple[str, ...] | None) -> SplitReport:
    readable = [image for image in images if image.failure is None]
    sides = np.array([(image.width, image.height) for image in readable])
    sizes = None
    if readable:
        summary = {"min": sides.min(0), "median": np.median(sides, axis=0), "max": sides.max(0)}
        sizes = {name: (int(width), int(height)) for name, (width, height) in summary.items()}
    per_class = None
    if source.labels is not None:
        counts = np.bincount(source.labels, minlength=len(class_names or ())).tolist()
        per_class = {class_names[label] if class_names else str(label): count for label, count in enumerate(counts)}
    unreadable = [(image.failure.name, image.failure.cause) for image in images if image.failure is not None]
    modes = Counter(image.mode for image in readable)
    return SplitReport(len(source), per_class, sizes, dict(modes.most_common()), unreadable)


def _split_rows(split: SplitReport) -> list[tuple[str, str]]:
    rows = [("images", f"{split.num_images:,}")]
    if split.num_per_class is None:
        rows.append(("classes", "no labels"))
    else:
        counts = split.num_per_class.values()
        rows.append(("classes", f"{len(counts)}, {min(counts)} to {max(counts)} images each"))
    if split.sizes is not None:
        sizes = ", ".join(f"{name} {width} x {height}" for name, (width, height) in split.sizes.items())
        rows.append(("width x height", sizes))
    rows.append(("modes", ", ".join(f"{mode} {count:,}" for mode, count in split.modes.items()) or "-"))
    examples = [f"{name} ({reason})" for name, reason in split.unreadable]
    rows.append(("unreadable", _examples(len(examples), examples)))
    return rows


def _groups(groups: list[list[str]]) -> str:
    return _examples(len(groups), [" = ".join(group[:NUM_SHOWN]) for group in groups], "groups")


def _examples(count: int, examples: list[str], unit: str = "") -> str:
    if not count:
        return "none"
    shown = "; ".join(examples[:NUM_SHOWN]) + ("; ..." if count > NUM_SHOWN else "")
    return f"{count:,} {unit}: {shown}" if unit else f"{count:,}: {shown}"
