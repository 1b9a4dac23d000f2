"""Small real parts for evaluators: images, their views, a tiny student and teacher, and the loss."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dino.augmentation import MultiCrop
from dino.backbone import VisionTransformer
from dino.dataset import Digits, Folder, ImageDataset, Splits, StackedSource
from dino.evaluation import EvaluationInputs
from dino.loss import DINOLoss, EMACentering
from dino.model import DINOHead, MultiCropModel, StudentTeacher

SETTINGS: dict[str, Any] = {
    "channels": 1,
    "mean": [0.3],
    "std": [0.37],
    "global_size": 16,
    "local_size": 8,
    "evaluation_resize": 16,
    "evaluation_size": 16,
    "batch_size": 64,
    "num_workers": 0,
}


@dataclasses.dataclass(kw_only=True)
class Noise(ImageDataset):
    """Random images, with or without labels and a held-out split."""

    labelled: bool = True
    has_held_out: bool = True

    def _open(self) -> Splits:
        train = self._source(40)
        return Splits(train, bank=train, held_out=self._source(13) if self.has_held_out else None)

    def _source(self, size: int) -> StackedSource:
        generator = torch.Generator().manual_seed(size)
        images = torch.randint(0, 256, (size, 1, 16, 16), dtype=torch.uint8, generator=generator)
        return StackedSource(images, np.arange(size) % 3 if self.labelled else None, "noise")


@pytest.fixture
def make_digits() -> Callable[..., ImageDataset]:
    """`make_digits(num_workers=2)`: the digits, with the named settings changed."""
    return lambda **changes: Digits(**(SETTINGS | {"name": "digits"} | changes))


@pytest.fixture
def make_noise() -> Callable[..., ImageDataset]:
    """`make_noise(labelled=False)`: 40 training and 13 held-out images of noise."""
    return lambda **changes: Noise(**(SETTINGS | {"name": "noise"} | changes))


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[[], ImageDataset]:
    """A folder of gray PNG files of several sizes in two classes: 12 to train on, 7 held out."""

    def make() -> ImageDataset:
        draw = np.random.default_rng(0)
        for split, count in (("train", 12), ("val", 7)):
            for index in range(count):
                path = tmp_path / split / "ab"[index % 2] / f"{split}{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draw.integers(0, 256, (20 + index, 24), dtype=np.uint8)).save(path)
        return Folder(**(SETTINGS | {"name": "folder", "root": str(tmp_path), "evaluation_resize": 18}))

    return make


@pytest.fixture
def make_augmentation() -> Callable[..., MultiCrop]:
    """`make_augmentation(num_local_views=0)`: gray views of 16 and 8 pixels, with every random part in use."""
    settings = {
        "global_size": 16,
        "local_size": 8,
        "num_local_views": 3,
        "blur_probability": [0.5, 0.1, 0.2],
        "saturation": 0.0,
        "hue": 0.0,
        "grayscale_probability": 0.0,
        "channels": 1,
        "mean": [0.3],
        "std": [0.37],
    }
    return lambda **changes: MultiCrop(**(settings | changes))


@pytest.fixture
def make_inputs(
    make_digits: Callable[..., ImageDataset], make_augmentation: Callable[..., MultiCrop], tmp_path: Path
) -> Callable[..., EvaluationInputs]:
    """`make_inputs(limit_samples=50)`: what an evaluator gets, on the CPU, with the named fields changed."""
    torch.set_num_threads(1)

    def make(**changes: Any) -> EvaluationInputs:
        torch.manual_seed(0)
        backbone = VisionTransformer(
            image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, channels=1, drop_path_rate=0.3
        )
        head = DINOHead(in_dim=16, out_dim=32, hidden_dim=24, bottleneck_dim=8)
        loss = DINOLoss(EMACentering(out_dim=32), student_temp=0.1)
        loss.centering.center.copy_(torch.linspace(-0.1, 0.1, 32))
        fields: dict[str, Any] = {
            "model": StudentTeacher(MultiCropModel(backbone, head)),
            "dataset": make_digits(),
            "augmentation": make_augmentation(),
            "loss": loss,
            "device": torch.device("cpu"),
            "autocast": contextlib.nullcontext,
            "seed": 5,
            "teacher_temp": 0.05,
            "limit_samples": None,
            "untrained": False,
            "folder": tmp_path / "run" / "evaluation",
            "directory": tmp_path / "run",
            "step": 132,
        }
        fields |= changes
        return EvaluationInputs(**{"backbone": fields["model"].teacher.backbone} | fields)

    return make
