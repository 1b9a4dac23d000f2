"""Views: from JPEG files to the tensors that cross to the training device, and from images in memory.

Photographs: 500 x 375 pixels, quality 92, to 2 views of 224 and 6 of 96 pixels, on one core. The baseline and lightly
hand on normalised floats. Ours hands on uint8, with colours changed where it says so; `crops only` leaves that to the
device. From memory: one batch of the Fashion-MNIST recipe, 28 pixels, beside the training step that it feeds.
"""

import gzip
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from benchmarks import baseline
from benchmarks.harness import Contender, Unavailable, compare
from benchmarks.options import Options
from benchmarks.training_steps import BaselineStep, OurStep
from dino.config import build, compose
from dino.dataset import TrainLoader

WIDTH, HEIGHT, QUALITY = 500, 375, 92
BATCH = 16


def measure(options: Options) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="views_") as folder:
        kind = write_photos(Path(folder) / "photos", options.images, BATCH if options.quick else 4 * BATCH)
        write_fashion_mnist(Path(folder), 128 if options.quick else 4096)
        return [_from_photos(Path(folder) / "photos", kind, options), *_from_memory(Path(folder), options)]


def _from_photos(folder: Path, kind: str, options: Options) -> dict[str, Any]:
    ours = {
        "ours": ["augmentation.photometric_device=cpu"],
        "ours, colours as a matrix": ["augmentation.photometric_device=cpu", "augmentation.jitter_form=matrix"],
        "ours, crops only": ["augmentation.photometric_device=device"],
    }
    contenders = [
        Contender("baseline", "benchmarks.views:PlainPhotos", {"folder": str(folder)}, threads=1),
        Contender("lightly", "benchmarks.views:LightlyPhotos", {"folder": str(folder)}, threads=1),
        *(
            Contender(name, "benchmarks.views:OurPhotos", {"folder": str(folder), "overrides": overrides}, threads=1)
            for name, overrides in ours.items()
        ),
    ]
    sampling = options.sampling(rounds=9, device="cpu")
    return compare(f"Photographs, {kind}, on the CPU", contenders, sampling, per=BATCH, unit="images/s", memory="none")


def _from_memory(folder: Path, options: Options) -> list[dict[str, Any]]:
    parts = [f"{whose} {part}" for part in ("views", "step") for whose in ("baseline", "ours")]
    comparison = compare(
        "From memory, batch 64, one thread, on the CPU",
        [
            Contender(part, "benchmarks.views:in_memory", {"part": part, "root": str(folder)}, threads=1)
            for part in parts
        ],
        options.sampling(rounds=9, device="cpu"),
        memory="none",
        references=(),
    )
    seconds = {part: comparison["contenders"][part]["seconds"]["median"] for part in parts}
    rows = []
    for whose in ("baseline", "ours"):
        views, step = seconds[f"{whose} views"], seconds[f"{whose} step"]
        rows.append([whose, f"{views / (views + step):.1%}"])
    name, columns = "Share of views in a step, on the CPU", ["", "views / (views + step)"]
    return [comparison, {"name": name, "columns": columns, "rows": rows}]


class PlainPhotos:
    """PIL and torchvision; one repetition is `BATCH` images."""

    def __init__(self, device: torch.device, folder: str) -> None:
        self.paths = itertools.cycle(sorted(Path(folder).rglob("*.jpg")))
        self.transform = self.make_transform()

    def __call__(self) -> list[Sequence[Tensor]]:
        return [self.transform(Image.open(path).convert("RGB")) for path in itertools.islice(self.paths, BATCH)]

    def make_transform(self) -> Callable[[Image.Image], Sequence[Tensor]]:
        return baseline.multi_crop_transform(num_local_views=6)

    def answer(self) -> None:
        return None


class LightlyPhotos(PlainPhotos):
    """lightly's transform, whose defaults are the same augmentation."""

    def make_transform(self) -> Callable[[Image.Image], Sequence[Tensor]]:
        try:
            from lightly.transforms import DINOTransform
        except ImportError as error:
            raise Unavailable("lightly is not installed: pip install -e .[bench]") from error
        transform: Callable[[Image.Image], Sequence[Tensor]] = DINOTransform(n_local_views=6)
        return transform


class OurPhotos:
    """The training loader without workers; one repetition is a batch."""

    def __init__(self, device: torch.device, folder: str, overrides: Sequence[str]) -> None:
        settings = ["dataset=folder", f"dataset.root={folder}", f"dataset.batch_size={BATCH}", "dataset.num_workers=0"]
        self.batches = batches(compose([*settings, "augmentation.num_local_views=6", *overrides]))

    def __call__(self) -> Any:
        return next(self.batches)

    def answer(self) -> None:
        return None


class OurMemory:
    """Views from memory, coloured and normalised on the CPU."""

    def __init__(self, config: DictConfig) -> None:
        self.batches = batches(config)
        self.augmentation = make_augmentation(config)

    def __call__(self) -> Any:
        return self.augmentation.photometric(next(self.batches))

    def answer(self) -> None:
        return None


class PlainMemory:
    """The same by PIL, image by image, in batches of a DataLoader without workers."""

    def __init__(self, config: DictConfig) -> None:
        images = build(config, "dataset").train().images
        dataset = PILImages(images, baseline_transform(config))
        loader = torch.utils.data.DataLoader(dataset, config.dataset.batch_size, shuffle=True, drop_last=True)
        self.batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def __call__(self) -> Any:
        return next(self.batches)

    def answer(self) -> None:
        return None


class PILImages(torch.utils.data.Dataset[list[Tensor]]):
    """Gray images in memory, as PIL images through a transform."""

    def __init__(self, images: Tensor, transform: Callable[[Image.Image], list[Tensor]]) -> None:
        self.images, self.transform = images.numpy(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(Image.fromarray(self.images[index, 0]))


def in_memory(device: torch.device, part: str, root: str) -> Any:
    """`baseline views`, `ours step`, ... of the Fashion-MNIST recipe."""
    config = compose(["dataset=fashion_mnist", f"dataset.root={root}", "trainer.freeze_last_layer_epochs=0"])
    match part:
        case "baseline views":
            return PlainMemory(config)
        case "ours views":
            return OurMemory(config)
        case "baseline step":
            return BaselineStep(config, "fp32", device)
        case "ours step":
            return OurStep(config, device)
    raise ValueError(part)


def batches(config: DictConfig) -> Iterator[Any]:
    """Of the training loader, epoch after epoch."""
    loader = TrainLoader(build(config, "dataset"), make_augmentation(config), seed=0)
    for epoch in itertools.count():
        yield from loader.epoch(epoch)


def make_augmentation(config: DictConfig) -> Any:
    mean, std = build(config, "dataset").normalization()
    return build(config, "augmentation", mean=mean, std=std)


def baseline_transform(config: DictConfig) -> Callable[[Image.Image], list[Tensor]]:
    """The baseline's views with the settings of the config."""
    made = config.augmentation
    return baseline.multi_crop_transform(
        num_local_views=made.num_local_views,
        global_size=made.global_size,
        local_size=made.local_size,
        global_scale=made.global_scale,
        local_scale=made.local_scale,
        flip_probability=made.flip_probability,
        jitter=(made.brightness, made.contrast, made.saturation, made.hue),
        grayscale_probability=made.grayscale_probability,
        blur_probability=made.blur_probability,
        solarize_probability=made.solarize_probability,
        mean=list(made.mean),
        std=list(made.std),
    )


def write_photos(folder: Path, images: Path | None, count: int) -> str:
    """Writes `count` JPEGs in two class folders; returns what they are."""
    rng = np.random.default_rng(0)
    if images is None:
        kind, sources = "made up", (_photo_like(rng) for _ in range(count))
    else:
        suffixes = (".jpg", ".jpeg", ".png")
        paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in suffixes)
        if not paths:
            raise ValueError(f"--images {images}: there are no {', '.join(suffixes)} files in it")
        chosen = [paths[i * len(paths) // count] for i in range(count)]
        kind, sources = "real", (Image.open(path).convert("RGB").resize((WIDTH, HEIGHT)) for path in chosen)
    for number, image in enumerate(sources):
        path = folder / f"class_{number % 2}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=QUALITY)
    return kind


def _photo_like(rng: np.random.Generator) -> Image.Image:
    """Noise of several scales, most of it coarse and gray, as in photographs."""
    total = np.zeros((HEIGHT, WIDTH, 3))
    for size, strength in ((3, 60.0), (9, 30.0), (30, 15.0), (100, 8.0), (300, 4.0)):
        gray, colour = rng.normal(size=(size, size, 1)), rng.normal(size=(size, size, 3))
        noise = np.uint8(np.clip(128 + 40 * (gray + 0.4 * colour), 0, 255))
        total += strength / 40 * (np.float64(Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.BICUBIC)) - 128)
    return Image.fromarray(np.uint8(np.clip(128 + total, 0, 255)))


def write_fashion_mnist(root: Path, count: int) -> None:
    """Random images where Fashion-MNIST would lie; their content does not change how long views take."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        for name, values in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">i4").tobytes()
            (folder / f"{name}.gz").write_bytes(gzip.compress(header + values.tobytes(), compresslevel=1))
