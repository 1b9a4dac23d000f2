"""Images: where they come from, in which order, and how they reach training and evaluation."""

from dino.dataset.base import ImageDataset, Splits
from dino.dataset.bench import BenchReport, bench
from dino.dataset.check import DatasetReport, check
from dino.dataset.digits import Digits
from dino.dataset.evaluation_loader import EvaluationLoader
from dino.dataset.folders import FileDataset, Folder, ImageNet, ImageNet100
from dino.dataset.loader import TrainLoader
from dino.dataset.sampler import ShuffledSampler, steps_per_epoch
from dino.dataset.source import FileSource, Source, StackedSource, SubsetSource, UnreadableImage, spread_indices
from dino.dataset.torchvision_sets import CIFAR10, CIFAR100, STL10, FashionMNIST, Imagenette

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "STL10",
    "BenchReport",
    "DatasetReport",
    "Digits",
    "EvaluationLoader",
    "FashionMNIST",
    "FileDataset",
    "FileSource",
    "Folder",
    "ImageDataset",
    "ImageNet",
    "ImageNet100",
    "Imagenette",
    "ShuffledSampler",
    "Source",
    "Splits",
    "StackedSource",
    "SubsetSource",
    "TrainLoader",
    "UnreadableImage",
    "bench",
    "check",
    "spread_indices",
    "steps_per_epoch",
]
