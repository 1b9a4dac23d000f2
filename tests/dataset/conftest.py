"""Small generated images for the tests of the dataset package."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino.dataset import Folder


@pytest.fixture
def write_image() -> Callable[..., Path]:
    """`write_image(path, height=20, width=24, seed=0)`: a colour image of random pixels, folders made as needed."""

    def write(path: Path, height: int = 20, width: int = 24, seed: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    return write


@pytest.fixture
def write_images(write_image: Callable[..., Path]) -> Callable[..., list[Path]]:
    """`write_images(folder, 5)`: 0000.png ... 0004.png, all different."""

    def write(folder: Path, count: int, suffix: str = ".png", first_seed: int = 0) -> list[Path]:
        return [
            write_image(folder / f"{number:04d}{suffix}", 18 + number % 5, 24, first_seed + number)
            for number in range(count)
        ]

    return write


@pytest.fixture
def truncate() -> Callable[[Path], None]:
    """Cuts a file to a half: a JPEG that opens and then fails to decode."""

    def cut(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])

    return cut


@pytest.fixture
def folder() -> Callable[..., Folder]:
    """`folder(root, batch_size=4)`: a folder dataset with small sizes."""

    def make(root: Path | None, **changes: object) -> Folder:
        settings: dict[str, object] = {
            "name": "folder",
            "root": None if root is None else str(root),
            "channels": 3,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
            "global_size": 16,
            "local_size": 8,
            "evaluation_resize": 16,
            "evaluation_size": 16,
            "batch_size": 2,
            "num_workers": 0,
            "max_bad_fraction": 0.0,
        }
        return Folder(**(settings | changes))  # type: ignore[arg-type]

    return make
