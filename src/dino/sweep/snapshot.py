"""A copy of the code for the jobs of a sweep, so that what is edited later changes nothing that is queued."""

import hashlib
import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from dino.code import RECORD, REPOSITORY, commit, git
from dino.sweep.manifest import MANIFEST, Manifest, Snapshot

LEFT_OUT = (".git", ".venv", "outputs", "node_modules")  # where git does not say what belongs to it
CACHE = "__pycache__"
LARGEST_COPY = 200 * 2**20  # more is not code [bytes]


def take_snapshot(manifest: Manifest, source: Path = REPOSITORY) -> int:
    """The number of a snapshot of `source` as it is now; an earlier one of the same code is used again.

    Raises:
        ValueError: there is far more than code.
    """
    contents = _contents(source)
    _refuse_data(source, contents)
    now = _digest(contents)
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
    """All that git tracks or would track, but for sweeps; without git, all but environments, outputs and caches."""
    try:
        names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", folder=source).split("\0")
    except (OSError, subprocess.SubprocessError):
        names = []
    found = [(name, source / name) for name in sorted(set(names)) if name] or list(_walk(source, LEFT_OUT))
    sweeps = {path.parent for name, path in found if path.name == MANIFEST}
    return [(name, path) for name, path in found if path.is_file() and not sweeps & set(path.parents)]


def _refuse_data(source: Path, contents: list[tuple[str, Path]]) -> None:
    sizes: Counter[str] = Counter()
    for name, path in contents:
        sizes[name.split("/")[0]] += path.stat().st_size
    if sum(sizes.values()) > LARGEST_COPY:
        ((largest, size),) = sizes.most_common(1)
        raise ValueError(
            f"{source / largest}: {size / 2**20:.0f} MiB among the code, which every sweep copies; "
            "name it in .gitignore, or move it elsewhere"
        )


def _walk(folder: Path, left_out: Sequence[str] = ()) -> Iterator[tuple[str, Path]]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in (CACHE, *left_out))
        for name in files:
            path = Path(parent) / name
            yield path.relative_to(folder).as_posix(), path


def _digest(contents: Iterator[tuple[str, Path]] | list[tuple[str, Path]]) -> str:
    total = hashlib.sha256()
    for name, path in sorted(contents):
        total.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()
