"""Checkpoints on disk: written whole or not at all, verified when read, the newest valid one found by itself."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dino.run import write_json

log = logging.getLogger("dino")


@dataclass(frozen=True)
class CheckpointStore:
    """`checkpoints/step_00001234.pt`, each with `step_00001234.json` (checksum, step, metrics) beside it.

    `last.pt` and `best.pt` are symbolic links; the file behind `best.pt` outlives the `keep` newest ones.
    """

    directory: Path
    keep: int

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"trainer.keep_checkpoints={self.keep}: keep at least 1")

    def save(self, step: int, state: dict[str, Any], metrics: dict[str, float], *, best: bool) -> Path:
        """Writes to a temporary name, flushes to the disk, then renames; then prunes older files.

        Raises:
            TypeError: if `state` holds anything but tensors and plain types, which `weights_only` loading would refuse.
        """
        check_plain(state, "state")
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"step_{step:08d}.pt"
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        # The sidecar comes first: a checkpoint without its checksum is not a valid one.
        write_json(path.with_suffix(".json"), {"step": step, "sha256": checksum(temporary), "metrics": metrics})
        temporary.replace(path)
        self._link("last.pt", path)
        if best:
            self._link("best.pt", path)
        self._prune()
        return path

    def newest_valid(self) -> Path | None:
        """The newest checkpoint whose checksum holds; a damaged one is named and passed over."""
        for path in self._files():
            if is_valid(path):
                return path
            log.warning("checkpoint %s is damaged or incomplete; using the one before it", path)
        return None

    def _files(self) -> Iterator[Path]:
        """Newest first."""
        yield from sorted(self.directory.glob("step_*.pt"), reverse=True)

    def _link(self, name: str, target: Path) -> None:
        link = self.directory / f".{name}"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.replace(self.directory / name)

    def _prune(self) -> None:
        best = self.directory / "best.pt"
        for path in list(self._files())[self.keep :]:
            if not (best.exists() and best.samefile(path)):
                path.unlink()
                path.with_suffix(".json").unlink(missing_ok=True)


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_valid(path: Path) -> bool:
    try:
        sidecar = json.loads(path.with_suffix(".json").read_text())
        return bool(sidecar["sha256"] == checksum(path))
    except (OSError, ValueError, KeyError):
        return False


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint of ours, on the CPU; runs no code from the file.

    Raises:
        ValueError: for a file that is missing, or whose checksum does not hold.
    """
    path = path.resolve()
    if not path.is_file():
        raise ValueError(f"resume={path}: there is no such checkpoint")
    if not is_valid(path):
        raise ValueError(f"resume={path}: the file is damaged, or its checksum in {path.stem}.json is missing")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def check_plain(value: object, name: str) -> None:
    """Raises `TypeError` unless `value` is made of tensors, dictionaries, lists, tuples and plain values."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_plain(key, f"{name} key {key!r}")
            check_plain(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple) and type(value) in (list, tuple):
        for position, item in enumerate(value):
            check_plain(item, f"{name}[{position}]")
    elif type(value) not in (torch.Tensor, torch.nn.Parameter, str, int, float, bool, type(None)):
        raise TypeError(f"{name} is a {type(value).__name__}; checkpoints hold only tensors and plain types")
