"""Writing a trained backbone in one or several layouts, and checking each by the library that reads it."""

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dino.export.formats import FORMATS, Format
from dino.trained import Trained

TOLERANCE = 1e-4  # of the largest feature: beyond it an export counts as wrong
NUM_IMAGES = 3


@dataclass(frozen=True)
class Exported:
    """One layout at one size, as it was read back."""

    format: str
    path: Path
    image_size: int
    largest_difference: float  # of a feature, from the network that was exported
    largest_feature: float
    reader: str  # library and version
    usage: str  # one line

    @property
    def equal(self) -> bool:
        return self.largest_difference <= TOLERANCE * max(1.0, self.largest_feature)


def export(trained: Trained, formats: Sequence[str], folder: Path, sizes: Sequence[int] = ()) -> list[Exported]:
    """Writes every format at every size, with a JSON file beside it that says what it is and how far it is off.

    Formats that serve all sizes are written once.

    Args:
        sizes: sides of the images [pixels]; none: the one that the network is at home with.

    Raises:
        ValueError: for an unknown format, a library that is missing, or a backbone that a format has no place for.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ValueError(f"--format {','.join(formats)}: use one or more of {', '.join(FORMATS)}")
    for name in formats:
        for package in (FORMATS[name].library, *FORMATS[name].needs):
            if importlib.util.find_spec(package) is None:
                raise ValueError(
                    f"--format {name}: {package} is not installed; pip install it, or leave the format out"
                )
    folder.mkdir(parents=True, exist_ok=True)
    done = []
    for size in sizes or (trained.image_size,):
        sized = trained if size == trained.image_size else trained.at_size(size)
        for name in formats:
            if FORMATS[name].one_size:
                done.append(_exported(FORMATS[name], sized, folder))
    done += [_exported(FORMATS[name], trained, folder) for name in formats if not FORMATS[name].one_size]
    return sorted(done, key=lambda each: list(formats).index(each.format))


def _exported(layout: Format, trained: Trained, folder: Path) -> Exported:
    parts = [trained.network] + ([f"step_{trained.step:08d}"] if trained.step is not None else [])
    parts += [layout.name] if layout.name != "safetensors" else []
    parts += [str(trained.image_size)] if layout.one_size else []
    path = layout.write(trained, folder / "_".join(parts))
    beside = path / "dino.json" if path.is_dir() else path.with_suffix(".json")
    content: dict[str, Any] = {
        "format": layout.name,
        "backbone": trained.settings,
        "preparation": dataclasses.asdict(trained.preparation),
        "embed_dim": trained.backbone.embed_dim,
        "network": trained.network,
        "step": trained.step,
        "source": str(trained.file.resolve()),
        "settings": trained.run_settings,
    }
    beside.write_text(json.dumps(content, indent=1) + "\n")  # before it is read back, which may need it
    channels, size = trained.settings.get("channels", 3), trained.image_size
    images = torch.randn(NUM_IMAGES, channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # libraries make their networks in it
        expected = trained.backbone(images)
        found = layout.features(trained, path, images)
    exported = Exported(
        format=layout.name,
        path=path,
        image_size=size,
        largest_difference=(found - expected).abs().max().item(),
        largest_feature=expected.abs().max().item(),
        reader=layout.version(),
        usage=layout.usage(trained, path),
    )
    checked = {"reader": exported.reader, "largest_difference": exported.largest_difference}
    checked |= {"largest_feature": exported.largest_feature, "num_images": NUM_IMAGES, "image_size": size}
    beside.write_text(json.dumps(content | {"check": checked, "usage": exported.usage}, indent=1) + "\n")
    return exported
