"""Writing a trained backbone in one or several layouts, and checking each by the library that reads it."""

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dino.export.formats import FORMATS, Format, Size, Unsupported
from dino.trained import Trained

TOLERANCE = 1e-4  # of the largest feature: beyond it an export counts as wrong
NUM_IMAGES = 3


@dataclass(frozen=True)
class Exported:
    """One layout at one size, as it was read back."""

    format: str
    path: Path
    image_size: Size
    largest_difference: float  # of a feature, from the network that was exported
    largest_feature: float
    reader: str  # library and version
    usage: str  # one line

    @property
    def equal(self) -> bool:
        return self.largest_difference <= TOLERANCE * max(1.0, self.largest_feature)


def export(trained: Trained, formats: Sequence[str], folder: Path, sizes: Sequence[Size] = ()) -> list[Exported]:
    """Writes every format at every size, with a JSON file beside it that says what it is and how far it is off.

    Formats that serve all sizes are written once. Nothing is written if one of the formats cannot be.

    Args:
        sizes: of the images; none: the square that the network is at home with.

    Raises:
        ValueError: for an unknown format, a library that is missing, a size that does not divide into patches or that a
            format cannot have, or a backbone that a format has no place for.
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
    layouts = [FORMATS[name] for name in formats]
    at_home = (trained.image_size, trained.image_size)
    sizes = sizes or [at_home]
    _refuse(trained, layouts, sizes)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(layout, size) for layout in layouts for size in (sizes if layout.one_size else [at_home])]
    return [_exported(layout, trained, folder, size) for layout, size in wanted]


def _refuse(trained: Trained, layouts: Sequence[Format], sizes: Sequence[Size]) -> None:
    """Raises `ValueError` for what cannot be written, all of it in one sentence."""
    problems = []
    for size in sizes:
        trained.backbone.check_size(*size)
    for layout in layouts:
        try:
            layout.check(trained, sizes)
        except Unsupported as error:
            problems.append(f"{layout.name}: {error}")
    if problems:
        raise ValueError(f"nothing was written, as not all formats can be; {'; '.join(problems)}")


def _exported(layout: Format, trained: Trained, folder: Path, size: Size) -> Exported:
    height, width = size
    if height == width != trained.image_size:
        trained = trained.at_size(height)
    parts = [trained.network] + ([f"step_{trained.step:08d}"] if trained.step is not None else [])
    parts += [layout.name] if layout.name != "safetensors" else []
    parts += [str(height) if height == width else f"{height}x{width}"] if layout.one_size else []
    channels = trained.settings.get("channels", 3)
    images = torch.randn(NUM_IMAGES, channels, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = trained.backbone(images)
    path = layout.write(trained, folder / "_".join(parts), size)
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
    with torch.no_grad():  # libraries make their networks in it
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
