"""Pictures of a run as parts of a page: inside the file, and no larger than there is room for."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

SMALLER = 0.75  # step by which a picture shrinks until it fits
MIN_SIDE = 64  # [pixels]


def embedded(path: Path, caption: str, max_bytes: int) -> str:
    """An `<img>` with its caption; words in its place where the file cannot be read or shrunk that far."""
    try:
        kind, content = _fitted(path, max_bytes)
    except (OSError, ValueError) as error:  # pillow's errors are among them
        return f"<p>{html.escape(f'{path.name}: {error}')}</p>"
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    words = html.escape(caption)
    return f'<figure><img src="{source}" alt="{words}"><figcaption>{words}</figcaption></figure>'


def _fitted(path: Path, max_bytes: int) -> tuple[str, bytes]:
    """The file as it is, or as a WebP that is as large as `max_bytes` of base64 allow."""
    room = max_bytes * 3 // 4
    content = path.read_bytes()
    if len(content) <= room:
        Image.open(io.BytesIO(content)).verify()
        return "png", content
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    while min(picture.size) >= MIN_SIDE:
        packed = io.BytesIO()
        picture.save(packed, "WEBP", quality=80)
        if packed.tell() <= room:
            return "webp", packed.getvalue()
        picture = picture.resize(
            (int(picture.width * SMALLER), int(picture.height * SMALLER)), Image.Resampling.LANCZOS
        )
    raise ValueError("too large for this page")


def all_embedded(pictures: Sequence[tuple[Path, str]], max_bytes: int) -> list[str]:
    """Pictures and captions, sharing the room evenly; what small ones leave goes to those after them."""
    parts = []
    for place, (path, caption) in enumerate(pictures):
        parts.append(embedded(path, caption, max_bytes // (len(pictures) - place)))
        max_bytes -= len(parts[-1])
    return parts
