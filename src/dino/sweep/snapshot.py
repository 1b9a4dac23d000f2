"""A copy of the code for the jobs of a sweep, so that what is edited later changes nothing that is queued."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from dino.code import RECORD, REPOSITORY, commit, git
from dino.sweep.manifest import Manifest, Snapshot

LEFT_OUT = (".git", ".venv", "outputs", "__pycache__", "node_modules")  # where git does not say what belongs to it
LARGEST_FILE = 20 * 2**20  # data that lies among the code stays where it is [bytes]


def take_snapshot(manifest: Manifest, source: Path = REPOSITORY) -> int:
    """The number of a snapshot of `source` as it is now; an earlier one of the same code is used again."""
    now = _digest(_contents(source))
    for number, snapshot in enumerate(manifest.snapshots):
        if snapshot.digest == now:
            return number
    number = len(manifest.snapshots)
    folder = "code" if number == 0 else f"code_{number + 1}"
    _copy(source, manifest.folder / folder)
    written = digest(manifest.folder / folder)  # of the copy: files may have changed while they were read
    manifest.snapshots.append(Snapshot(folder, written, commit(source), str(source)))
    return number


def digest(folder: Path) -> str:
    """SHA-256 of the names and contents of all files of a snapshot."""
    return _digest((name, path) for name, path in _walk(folder) if name != RECORD)


def _copy(source: Path, target: Path) -> None:
    """Complete or not there at all."""
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    for name, path in _contents(source):
        (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, unfinished / name)
    (unfinished / RECORD).write_text(json.dumps({"commit": commit(source)}) + "\n")
    shutil.rmtree(target, ignore_errors=True)  # of a submission that was killed before it wrote the manifest
    unfinished.rename(target)


def _contents(source: Path) -> list[tuple[str, Path]]:
    """All that git tracks or would track; without git, all but environments, outputs and caches."""
    try:
        names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", folder=source).split("\0")
    except (OSError, subprocess.SubprocessError):
        names = []
    found = [(name, source / name) for name in sorted(set(names)) if name] or list(_walk(source))
    return [(name, path) for name, path in found if path.is_file() and path.stat().st_size <= LARGEST_FILE]


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT)
        for name in files:
            path = Path(parent) / name
            yield path.relative_to(folder).as_posix(), path


def _digest(contents: Iterator[tuple[str, Path]] | list[tuple[str, Path]]) -> str:
    total = hashlib.sha256()
    for name, path in sorted(contents):
        total.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()
