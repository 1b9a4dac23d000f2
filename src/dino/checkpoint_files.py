"""Checkpoints as files: their names, what lies beside them, which are valid, which may go. Imports no torch.

`checkpoints/step_00001234.pt` has a sidecar `step_00001234.json`: step, sha256, bytes, metrics, stays, saved, and what
it replaces. `last.pt` and `best.pt` are symbolic links. Whatever ends in `.tmp` is being written, or was when its
process was killed. In `abandoned/` lie the checkpoints of later steps than the one from which the run was continued.
"""

import errno
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = re.compile(r"step_(\d+)\.pt")
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Entry:
    """One checkpoint as it lies on the disk."""

    path: Path
    step: int
    size: int  # [bytes]
    saved: float  # unix time [s]
    metrics: dict[str, float]
    problem: str | None  # why it is not valid
    best: bool
    last: bool
    stays: bool

    @property
    def valid(self) -> bool:
        return self.problem is None


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}.pt"


def files(directory: Path) -> list[Path]:
    """Newest first."""
    return sorted((path for path in directory.glob("step_*.pt") if NAME.fullmatch(path.name)), key=step_of)[::-1]


def step_of(path: Path) -> int:
    name = NAME.fullmatch(path.name)
    assert name is not None
    return int(name[1])


def entries(directory: Path) -> list[Entry]:
    """All checkpoints, newest first, each verified: reads every file whole."""
    return [_entry(path) for path in files(directory) if path.exists()]  # a live run may just have pruned one


def _entry(path: Path) -> Entry:
    sidecar, status = read_sidecar(path) or {}, path.stat()
    return Entry(
        path=path,
        step=step_of(path),
        size=status.st_size,
        saved=sidecar.get("saved", status.st_mtime),
        metrics=sidecar.get("metrics", {}),
        problem=find_problem(path),
        best=is_linked(path, "best.pt"),
        last=is_linked(path, "last.pt"),
        stays=sidecar.get("stays", False),
    )


# ---------------------------------------------------------------------- validity


def find_problem(path: Path, *, read: bool = True) -> str | None:
    """What is wrong with a checkpoint; None for a valid one. With `read=False` only the size is compared."""
    if path.is_dir():
        return "it is a folder, not a file"
    sidecar = read_sidecar(path)
    if sidecar is None:
        return f"its checksum file {path.stem}.json is missing or unreadable"
    # While a file is being replaced, the new sidecar stands beside the old file; for good where the replacing failed.
    contents = [sidecar, *sidecar["replaces"]]
    try:
        size = path.stat().st_size
        contents = [content for content in contents if content["bytes"] == size]
        if not contents:
            return f"its size is {size} bytes, but {sidecar['bytes']} were written"
        if read and checksum(path) not in [content["sha256"] for content in contents]:
            return "its checksum differs from the one written"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """What was noted when the checkpoint was written; None where that is missing or makes no sense."""
    try:
        sidecar = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return None
    complete = isinstance(sidecar, dict) and {"sha256", "bytes", "metrics", "stays", "saved"} <= sidecar.keys()
    return sidecar if complete and isinstance(sidecar.get("replaces"), list) else None


def sidecars_alone(directory: Path) -> list[Path]:
    """Those without a checkpoint: it was never finished, or somebody removed it."""
    return [path for path in directory.glob("step_*.json") if not path.with_suffix(".pt").exists()]


# ---------------------------------------------------------------------- changing the folder


def write_sidecar(path: Path, content: dict[str, Any]) -> None:
    """Puts the sidecar in place, durably, before its checkpoint is; a file of this name that is there stays valid."""
    before = read_sidecar(path) if path.exists() else None
    earlier = [before, *before["replaces"]] if before is not None else []
    replaces = {old["sha256"]: {"sha256": old["sha256"], "bytes": old["bytes"]} for old in earlier}  # each once
    temporary = path.with_suffix(".json.tmp")
    with temporary.open("w") as file:
        json.dump(content | {"replaces": list(replaces.values())}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    move(temporary, path.with_suffix(".json"))


def move(temporary: Path, path: Path) -> None:
    """Renames, and flushes the folder so that the new name outlives a power cut."""
    temporary.replace(path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush folders
            raise
    finally:
        os.close(descriptor)


def link(name: str, path: Path) -> None:
    """Lets the symbolic link `name`, in the same folder, name `path`, where it does not already."""
    if is_linked(path, name):
        return
    temporary = path.with_name(f"{name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.name)
    move(temporary, path.with_name(name))


def is_linked(path: Path, name: str) -> bool:
    named = path.with_name(name)
    return named.is_symlink() and named.readlink().name == path.name


def prune(new: Path, keep: int) -> None:
    """Leaves the `keep` newest that look whole, `new` (known to be valid), the best one, and those that stay."""
    all_files = files(new.parent)
    newest = [path for path in all_files if find_problem(path, read=False) is None][:keep]
    for path in all_files:
        stays = (read_sidecar(path) or {}).get("stays", False)
        if path not in (new, *newest) and not stays and not is_linked(path, "best.pt") and not path.is_dir():
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)


def set_aside(directory: Path, after: int) -> list[Path]:
    """Moves every checkpoint of a step larger than `after`, valid or not, to `abandoned/`, durably, the newest first.

    Beside that one goes a copy of the run's metrics, whose lines of later steps will be cut.
    Nothing there is overwritten: the second `step_00000045.pt` becomes `step_00000045.1.pt`, which loads as well.
    `last.pt` then names the newest one that remains; `best.pt` is removed where what it named is.
    """
    found = files(directory)
    later = [path for path in found if step_of(path) > after]
    remaining = found[len(later) :]
    # The links come first: whenever this stops, none of them dangles.
    for named in (directory / "last.pt", directory / "best.pt"):
        name = NAME.fullmatch(named.readlink().name) if named.is_symlink() else None
        if name is None or int(name[1]) <= after:
            continue
        if named.name == "last.pt" and remaining:
            link("last.pt", remaining[0])
        else:
            named.unlink()
            flush_folder(directory)
    moved = [_abandon(path, with_metrics=path == later[0]) for path in later]
    if moved:
        flush_folder(directory)
    return moved


def set_metrics_aside(directory: Path) -> Path | None:
    """Moves the run's metrics to `abandoned/`, durably: all that is left where somebody has removed the checkpoints."""
    metrics = directory.parent / "metrics.jsonl"
    if not metrics.exists():
        return None
    target = _free_name(metrics.name, directory / "abandoned")
    move(metrics, target)
    return target


def _free_name(name: str, folder: Path) -> Path:
    """`name` in `folder`, which is made, or the first of `name.1`, `name.2` ... that nothing there has."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    numbered = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
    candidates = itertools.chain([path], numbered)
    return next(new for new in candidates if not (new.exists() or new.with_suffix(".json").exists()))


def _abandon(path: Path, *, with_metrics: bool) -> Path:
    sidecar, target = path.with_suffix(".json"), _free_name(path.name, path.parent / "abandoned")
    # Copied before the checkpoint moves, and the sidecar removed after: whenever this stops, they are beside it.
    copies = {sidecar: ".json"}
    if with_metrics:
        copies[path.parent.parent / "metrics.jsonl"] = ".metrics.jsonl"
    for source, suffix in copies.items():
        if source.exists():
            with target.with_suffix(suffix).open("wb") as file:
                file.write(source.read_bytes())
                file.flush()
                os.fsync(file.fileno())
    move(path, target)
    sidecar.unlink(missing_ok=True)
    return target


def tidy(directory: Path) -> None:
    """Removes what killed processes left: temporary files, and sidecars without a checkpoint."""
    for path in (*directory.glob("*.tmp"), *sidecars_alone(directory)):
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------- for people


def find_folder(run: Path) -> Path:
    """The checkpoints folder of a run directory; that folder itself is fine, too.

    Raises:
        ValueError: for a path that is neither.
    """
    if run.name == "checkpoints" and run.is_dir():
        return run
    if (run / "checkpoints").is_dir() or (run / "status.json").is_file():
        return run / "checkpoints"
    what = "no run directory" if run.is_dir() else "there is no such directory"
    raise ValueError(f"{run}: {what}; give the directory of a run, which holds status.json and checkpoints/")


def table(rows: Sequence[Entry]) -> list[str]:
    """A header and one line for each checkpoint, in columns; nothing for none."""
    if not rows:
        return []
    cells = [("file", "step", "saved", "size", "state", "marks", "metrics")]
    for entry in rows:
        marks = [name for name in ("best", "last", "stays") if getattr(entry, name)]
        shown = [name for name in sorted(entry.metrics) if name == "train/loss" or name.startswith("val/")]
        cells.append(
            (
                entry.path.name,
                str(entry.step),
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.saved)),
                human_size(entry.size),
                "valid" if entry.problem is None else f"damaged: {entry.problem}",
                ", ".join(marks) or "-",
                ", ".join(f"{name} {entry.metrics[name]:.5g}" for name in shown) or "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


def human_size(num_bytes: float) -> str:
    """For example 706.3 MiB."""
    power = 0
    while num_bytes >= 1024 and power < len(UNITS) - 1:
        num_bytes, power = num_bytes / 1024, power + 1
    return f"{num_bytes:.1f} {UNITS[power]}" if power else f"{num_bytes:.0f} B"
