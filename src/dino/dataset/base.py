"""What every dataset is: splits of images, and the settings that follow from the data."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

from dino.dataset.source import Source
from dino.dataset.statistics import PixelStatistics, stored_statistics

AUTO = "auto"


@dataclass(frozen=True)
class Splits:
    """The parts of a dataset.

    `train` is what is trained on; `bank` are the images that a k-NN or a linear probe learns from (the training images,
    unless those have no labels but others have) and `held_out` those it is tested on. `class_names` are in the order of
    the labels.
    """

    train: Source
    bank: Source
    held_out: Source | None = None
    class_names: tuple[str, ...] | None = None


@dataclass(kw_only=True)
class ImageDataset(ABC):
    """A dataset and the settings that follow from it. Subclasses say in `_open` where the images are.

    Args:
        name: shown in logs and reports.
        channels: 1 (gray), 3 (colour) or what the files hold.
        mean: per channel, of pixels in 0..1; "auto" computes it once from the training images and stores it.
        std: likewise.
        global_size: side of a global crop that suits the images [pixels]; the augmentation picks it up.
        local_size: side of a local crop [pixels].
        evaluation_resize: short side of an image for evaluation [pixels].
        evaluation_size: side of the square then cut from its centre [pixels].
        batch_size: images per process and forward pass.
        num_workers: loader processes; 0 loads in the main process.
        max_bad_fraction: share of the training images that may turn out to be unreadable before the run stops.
        scaled_decoding: training reads JPEG files 2, 4 or 8 times smaller where the crops drawn from them allow it.

    Raises:
        ValueError: a setting that cannot be right.
    """

    name: str
    channels: int
    mean: str | list[float]
    std: str | list[float]
    global_size: int
    local_size: int
    evaluation_resize: int
    evaluation_size: int
    batch_size: int
    num_workers: int
    max_bad_fraction: float = 0.0
    scaled_decoding: bool = False
    _splits: Splits | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for key in ("channels", "global_size", "local_size", "evaluation_resize", "evaluation_size", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"dataset.{key} is {getattr(self, key)}; it must be at least 1")
        if self.num_workers < 0:
            raise ValueError(f"dataset.num_workers is {self.num_workers}; it must be 0 or more")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"dataset.max_bad_fraction is {self.max_bad_fraction}; it must lie between 0 and 1")
        if self.evaluation_resize < self.evaluation_size:
            raise ValueError(
                f"dataset.evaluation_resize is {self.evaluation_resize}; it must be at least "
                f"dataset.evaluation_size={self.evaluation_size}, which is cut from the resized image"
            )
        self._check_statistics("mean", self.mean)
        self._check_statistics("std", self.std)

    def open(self) -> None:
        """Finds the images; the first call does the work, later ones nothing.

        Raises:
            ValueError: the images are missing, or not laid out as they should be.
        """
        if self._splits is None:
            self._splits = self._open()

    def train(self) -> Source:
        """The images to train on."""
        return self._opened().train

    def evaluation(self) -> tuple[Source, Source] | None:
        """The images that a k-NN looks up, and the held-out ones it is asked about; None if nothing is held out."""
        splits = self._opened()
        return None if splits.held_out is None else (splits.bank, splits.held_out)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of the labels, where the data have some."""
        return self._opened().class_names

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the labelled images; None without labels."""
        splits = self._opened()
        if splits.class_names is not None:
            return len(splits.class_names)
        labelled = [source.labels for source in (splits.bank, splits.held_out) if source is not None]
        return max((int(labels.max()) + 1 for labels in labelled if labels is not None and len(labels)), default=None)

    def normalization(self) -> tuple[list[float], list[float]]:
        """Mean and std [C] of the pixels in 0..1; what is "auto" is looked up or computed now."""
        computed: PixelStatistics | None = None
        if self.mean == AUTO or self.std == AUTO:
            computed = stored_statistics(self.train(), self._statistics_folder())
        mean = computed.mean if computed is not None and isinstance(self.mean, str) else self.mean
        std = computed.std if computed is not None and isinstance(self.std, str) else self.std
        return [float(value) for value in mean], [float(value) for value in std]

    @abstractmethod
    def _open(self) -> Splits:
        """Finds the images."""

    def _statistics_folder(self) -> Path | None:
        """Where the data lie, to keep computed statistics there; None: the user's cache folder."""
        return None

    def _opened(self) -> Splits:
        self.open()
        assert self._splits is not None
        return self._splits

    def _check_statistics(self, key: str, values: str | list[float]) -> None:
        if isinstance(values, str):
            if values != AUTO:
                raise ValueError(f"dataset.{key} is {values!r}; it must be auto or a list of {self.channels} numbers")
            return
        if len(values) != self.channels:
            raise ValueError(
                f"dataset.{key} has {len(values)} numbers, but dataset.channels is {self.channels}: "
                f"give one for each channel, or auto"
            )
        if key == "std" and min(values) <= 0:
            raise ValueError(f"dataset.std is {values}; every number must be above 0")
