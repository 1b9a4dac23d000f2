"""`dino attend`: pictures of what a vision transformer sees in photographs and videos.

Shapes: C channels, H x W pixels, h x w patches, D features.
"""

import html
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import psutil
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from dino.analysis.images import embedded
from dino.checkpoint_files import human_size
from dino.contact_sheet import pictures_of
from dino.dataset.decode import convert_channels, decode_or_explain
from dino.dataset.listing import find_images
from dino.evaluation.attention import PatchColours, class_attention, correspondences, mass_mask, patch_features
from dino.evaluation.features import normalized
from dino.heat import heat
from dino.pages import document, section, table
from dino.trained import Trained

log = logging.getLogger("dino")

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v"}
BLEND = 0.55  # of the colours that are laid over an image
DARKENED = 0.25  # of an image outside of a mask
NUM_LINES = 40  # correspondences that are drawn
PICTURE_BYTES = 400_000  # of one picture on the page
IMAGES_ON_PAGE = 30  # each with about ten pictures


@dataclass(frozen=True)
class Looked:
    """What was seen in one image."""

    name: str
    image: Tensor  # uint8 [C, H, W], as the network had it
    attention: Tensor  # [heads, h, w]
    patches: Tensor  # [h, w, D]


@dataclass(frozen=True)
class Onlooker:
    """A network that looks at images of any size.

    Args:
        size: short side that images are brought to [pixels].
    """

    trained: Trained
    size: int
    device: torch.device

    def __post_init__(self) -> None:
        patch = self.trained.backbone.patch_size
        if self.size < patch:
            raise ValueError(f"--size {self.size}: use at least one patch of {patch} pixels")
        if not self.trained.backbone.has_tokens:
            raise ValueError(f"{type(self.trained.backbone).__name__} has no attention: use a ViT")
        self.trained.backbone.to(self.device)

    def look(self, image: Tensor, name: str) -> Looked:
        """At uint8 [C, H, W]: the short side is resized, both sides are cut to whole patches (right and bottom, as
        the original)."""
        patch = self.trained.backbone.patch_size
        height, width = image.shape[-2:]
        scale = self.size / min(height, width)
        size = [max(patch, round(side * scale)) for side in (height, width)]
        self._refuse_what_is_too_large(name, size[0] // patch, size[1] // patch)
        image = F.interpolate(image[None], size, mode="bicubic", antialias=True, align_corners=False)[0]
        image = image[:, : size[0] // patch * patch, : size[1] // patch * patch].contiguous()
        prepared = self.trained.preparation
        with torch.inference_mode():
            views = normalized(image[None].to(self.device), prepared.mean, prepared.std)
            attention = class_attention(self.trained.backbone, views)[0].float().cpu()
            patches = patch_features(self.trained.backbone, views)[0].float().cpu()
        return Looked(name, image, attention, patches)

    def _refuse_what_is_too_large(self, name: str, rows: int, columns: int) -> None:
        """Attention is a square matrix of the patches for each head; float32, before and after softmax."""
        needed = 2 * 4 * self.trained.backbone.num_heads * (rows * columns + 1) ** 2
        free = psutil.virtual_memory().available
        if self.device.type == "cuda":
            kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            free = torch.cuda.mem_get_info(self.device)[0] + kept
        if needed > free:
            raise ValueError(
                f"--size {self.size}: {name} has {rows} x {columns} patches then, whose attention takes "
                f"{human_size(needed)} of memory ({human_size(free)} are free); use a smaller --size"
            )


def found_images(path: Path) -> list[Path]:
    """An image, or all images in a folder and below it, in the order of their names.

    Raises:
        ValueError: if there is no such file, or none in the folder.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"--image {path}: there is no such file or folder")
    found = find_images(path)
    if not found:
        raise ValueError(f"--image {path}: no image in this folder")
    return [path / name for name in found]


def attend_images(
    onlooker: Onlooker, path: Path, output: Path, *, threshold: float | None = None, match: Path | None = None
) -> Path:
    """Pictures of an image, or of all images in a folder, and `index.html` with all of them, whose path it returns.

    Args:
        match: a second image, whose patches are matched with those of the first.

    Raises:
        ValueError: for what cannot be read, and a backbone without attention.
    """
    channels = onlooker.trained.settings.get("channels", 3)
    paths = found_images(path)
    alike = Counter(each.with_suffix("") for each in paths)
    named = {_name(each, path, alone=alike[each.with_suffix("")] == 1): each for each in paths}
    colours: PatchColours | None = None
    groups: dict[str, list[Path]] = {}
    first: Looked | None = None
    for name, each in named.items():
        try:
            looked = onlooker.look(decode_or_explain(each, channels, "--image"), name)
        except ValueError as error:
            if path.is_file():
                raise
            log.warning("left out: %s", error)
            continue
        colours = colours or PatchColours.fit(looked.patches)
        first = first or looked
        pictures = write_pictures(looked, output / name, threshold, colours)
        if len(groups) < IMAGES_ON_PAGE:
            groups[name] = pictures
    if first is None:
        raise ValueError(f"--image {path}: none of its {len(paths)} images can be looked at")
    if match is not None:
        second = onlooker.look(decode_or_explain(match, channels, "--match"), match.name)
        joined = output / "correspondence.png"
        count = write_correspondence(first, second, joined)
        groups[f"{first.name} and {match.name}: {count} patches are each other's nearest"] = [joined]
    trained = onlooker.trained
    facts = [
        ("weights", str(trained.report)),
        ("network", trained.network),
        ("short side", f"{onlooker.size} pixels, patches of {trained.backbone.patch_size}"),
        ("masks", "none" if threshold is None else f"the fewest patches with {threshold:.0%} of a head's attention"),
        ("patches", "colours are the three directions in which patches of the first image differ most"),
    ]
    if len(paths) > IMAGES_ON_PAGE:
        facts.append(("images", f"the first {IMAGES_ON_PAGE} of {len(paths)}; pictures of all lie beside this page"))
    page = output / "index.html"
    write_page(page, f"Attention in {path.name}", facts, groups)
    return page


def _name(file: Path, path: Path, alone: bool) -> str:
    """Of the folder for its pictures: without the ending, unless another image has the same name without it."""
    relative = file.relative_to(path) if path.is_dir() else Path(file.name)
    return str(relative.with_suffix("") if alone else relative.with_name(relative.name.replace(".", "_")))


# ---------------------------------------------------------------------- pictures


def write_pictures(looked: Looked, folder: Path, threshold: float | None, colours: PatchColours) -> list[Path]:
    """The image, the attention (mean over it, mean, every head), masks, and patches as colours; PNG files.

    Args:
        threshold: share of the mass that masks hold; None: no masks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    image = pictures_of(looked.image[None])[0]
    mean = looked.attention.mean(dim=0)
    pictures = {
        "image": image,
        "attention_over_image": Image.blend(image, heat(mean, image.size), BLEND),
        "attention_mean": heat(mean, image.size),
    }
    pictures |= {f"attention_head{k}": heat(weights, image.size) for k, weights in enumerate(looked.attention)}
    if threshold is not None:
        masks = mass_mask(looked.attention, threshold)
        pictures |= {f"mask_head{k}": _masked(image, mask) for k, mask in enumerate(masks)}
    rgb = (colours(looked.patches) * 255).round().byte().numpy()
    pictures["patches"] = Image.fromarray(rgb).resize(image.size, Image.Resampling.NEAREST)
    paths = []
    for name, picture in pictures.items():
        paths.append(folder / f"{name}.png")
        picture.save(paths[-1])
    return paths


def _masked(image: Image.Image, mask: Tensor) -> Image.Image:
    """The image, dark where the mask [h, w] is not."""
    stencil = Image.fromarray(mask.byte().numpy() * 255).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(image, Image.eval(image, lambda value: int(value * DARKENED)), stencil)


def write_correspondence(first: Looked, second: Looked, path: Path) -> int:
    """Both images beside each other, with lines between patches that are each other's nearest; how many there are."""
    left, right = (pictures_of(looked.image[None])[0] for looked in (first, second))
    sheet = Image.new("RGB", (left.width + right.width, max(left.height, right.height)))
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width, 0))
    pen = ImageDraw.Draw(sheet)
    pairs, _ = correspondences(first.patches, second.patches)
    patch = left.height // len(first.patches)
    chosen = pairs[:NUM_LINES].tolist()
    for place, (row, column, other_row, other_column) in enumerate(chosen):
        hue = Image.new("HSV", (1, 1), (place * 255 // max(1, len(chosen)), 220, 255)).convert("RGB").getpixel((0, 0))
        start = ((column + 0.5) * patch, (row + 0.5) * patch)
        end = (left.width + (other_column + 0.5) * patch, (other_row + 0.5) * patch)
        pen.line((start, end), fill=hue, width=max(1, patch // 8))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return len(pairs)


def write_page(path: Path, title: str, facts: Sequence[tuple[str, str]], groups: dict[str, list[Path]]) -> None:
    """One HTML file with all pictures in it, a section for each image."""
    body = [f"<h1>{html.escape(title)}</h1>", table(["", ""], facts)]
    for name, paths in groups.items():
        pictures = "".join(embedded(each, each.stem.replace("_", " "), PICTURE_BYTES) for each in paths)
        body.append(section(name, f'<div class="columns">{pictures}</div>'))
    path.write_text(document(title, body, figures=False))


# ---------------------------------------------------------------------- videos


def write_video(onlooker: Onlooker, path: Path, output: Path, max_frames: int | None = None) -> int:
    """Every frame beside its mean attention, as an MP4 of the same rate; returns how many there are.

    Raises:
        ValueError: for a file that is no video, and where the video cannot be written.
    """
    video = cv2.VideoCapture(str(path))
    rate = video.get(cv2.CAP_PROP_FPS) or 25.0
    writer, count = None, 0
    try:
        channels = onlooker.trained.settings.get("channels", 3)
        for frame in _frames(video, max_frames):
            looked = onlooker.look(convert_channels(frame, channels), path.name)
            image = pictures_of(looked.image[None])[0]
            shown = Image.new("RGB", (2 * image.width, image.height))
            shown.paste(image, (0, 0))
            shown.paste(heat(looked.attention.mean(dim=0), image.size), (image.width, 0))
            if writer is None:
                output.parent.mkdir(parents=True, exist_ok=True)
                writer = cv2.VideoWriter(str(output), cv2.VideoWriter.fourcc(*"mp4v"), rate, shown.size)
                if not writer.isOpened():
                    raise ValueError(f"{output}: OpenCV cannot write this video")
            writer.write(np.asarray(shown)[:, :, ::-1])
            count += 1
    finally:
        video.release()
        if writer is not None:
            writer.release()
    if count == 0:
        raise ValueError(f"--image {path}: no frame of it can be read as a video")
    return count


def _frames(video: cv2.VideoCapture, max_frames: int | None) -> Iterator[Tensor]:
    """uint8 [3, H, W] each."""
    count = 0
    while max_frames is None or count < max_frames:
        there, frame = video.read()
        if not there:
            return
        yield torch.from_numpy(np.ascontiguousarray(frame[:, :, ::-1])).permute(2, 0, 1)
        count += 1
