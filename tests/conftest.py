"""Fixtures shared by all tests: figures of the original implementation, and real images where they lie."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Read when torch is imported, here and in the commands that tests start: where the threads of several processes wait
# for one another on a busy machine, tiny networks take many times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def reference() -> Callable[[str], dict[str, Any]]:
    """`reference("loss_0.npz")`: the named file of `tests/reference/official_dino`, as a dictionary."""

    def load(name: str) -> dict[str, Any]:
        path = REPOSITORY / "tests" / "reference" / "official_dino" / name
        if path.suffix == ".json":
            return dict(json.loads(path.read_text()))
        with np.load(path) as arrays:
            return {key: arrays[key] for key in arrays.files}

    return load


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """`shared_data("fashion_mnist")`: a folder of real images, or a skip where there is none."""

    def find(name: str) -> Path:
        root = Path(os.environ.get("DINO_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
        if not (root / name).is_dir():
            pytest.skip(f"no real images at {root / name}: set DINO_TEST_DATA to the folder that holds {name}")
        return root / name

    return find
