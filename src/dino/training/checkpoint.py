"""Checkpoints: copied between two steps, written behind them, whole or not at all; verified when read."""

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dino import checkpoint_files
from dino.checkpoint_files import checkpoint_path, find_problem, human_size, link, move, write_sidecar

log = logging.getLogger("dino")

RETRY_WAITS_S = (1.0, 2.0, 4.0, 8.0)
SPARE_BYTES = 2**20  # asked for beyond the tensors: the rest of the state, the sidecar
# What network file systems and overloaded disks say for a while. A full disk does not empty itself: not among them.
TRANSIENT = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOLCK, errno.EREMOTEIO),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.ECONNRESET, errno.ECONNABORTED, errno.ENOTCONN, errno.ESHUTDOWN),
}


class SaveError(RuntimeError):
    """A checkpoint could not be written; those written before are as they were."""


@dataclass
class CheckpointStore:
    """The checkpoints of one run; see `dino.checkpoint_files` for what lies in the folder.

    `save` copies the state and writes the copy in a thread of its own, one at a time. What goes wrong there is logged
    when it happens, and waits for `take_error`. Kept are the `keep` newest, the best one, and those saved to stay.

    Raises:
        ValueError: for a `directory` that is no folder, and for `keep` below 1.
    """

    directory: Path
    keep: int
    saved_step: int | None = field(default=None, init=False)  # of the last one known to be whole on the disk
    _write: threading.Thread | None = field(default=None, init=False)
    # At most one; taking from a deque is atomic, and the writer may put one in at any moment.
    _error: deque[SaveError] = field(default_factory=lambda: deque(maxlen=1), init=False)

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"trainer.keep_checkpoints={self.keep}: keep at least 1")
        if os.path.lexists(self.directory) and not self.directory.is_dir():
            raise ValueError(f"run_dir={self.directory.parent}: {self.directory.name} is not a folder")

    def save(
        self,
        step: int,
        state: dict[str, Any],
        metrics: dict[str, float],
        *,
        best_step: int | None = None,
        stays: bool = False,
    ) -> None:
        """Copies `state` to the host and returns; the write goes on. First waits for the write before, if any.

        When the checkpoint is written, `best.pt` will name the one of `best_step`, this or an earlier one, where it is
        on the disk: what a failed or killed save has left out is made up for by the next one.

        Raises:
            TypeError: if `state` holds anything but tensors and plain types, which `weights_only` loading would refuse.
        """
        check_plain(state, "state")
        self.wait()
        try:
            self._ask_for_space(step, sum(tensor.nbytes for tensor in _tensors(state)))
        except SaveError as error:
            self._note(error)
            return
        sidecar = {"step": step, "metrics": dict(metrics), "stays": stays, "saved": time.time()}
        # Not a daemon: the interpreter finishes the write before it exits.
        self._write = threading.Thread(
            target=self._save, args=(step, _snapshot(state), sidecar, best_step), name=f"checkpoint of step {step}"
        )
        self._write.start()

    def wait(self) -> None:
        """Returns when no write is in flight."""
        if self._write is not None:
            self._write.join()
            self._write = None

    def take_error(self) -> SaveError | None:
        """The latest error that nobody has taken yet; never waits."""
        try:
            return self._error.pop()
        except IndexError:
            return None

    def fail(self, step: int, error: OSError) -> None:
        """Notes a save that could not begin, as one that the disk refused."""
        self._note(_failure(step, _what_and_where(error)))

    def newest_valid(self) -> Path | None:
        """The newest checkpoint whose checksum holds; newer, damaged ones are named. None where there is none at all.

        Raises:
            ValueError: where there are checkpoints, and all are damaged.
        """
        last, problems = self.directory / "last.pt", list[tuple[Path, str]]()
        if last.is_symlink() and not last.exists():
            problems.append((self.directory / last.readlink(), "it is gone"))
        for path in checkpoint_files.files(self.directory):
            problem = find_problem(path)
            if problem is None:
                for damaged, reason in problems:
                    log.warning("checkpoint %s is damaged: %s; using the one before it", damaged, reason)
                return path
            problems.append((path, problem))
        if problems:
            raise ValueError(
                f"{self.directory.parent}: none of its checkpoints is valid "
                f"({'; '.join(f'{path.name}: {problem}' for path, problem in problems)})"
            )
        return None

    def best(self) -> Path | None:
        """What `best.pt` names; None where it is missing, or names nothing."""
        path = self.directory / "best.pt"
        return path.resolve() if path.exists() else None

    def point_best_to(self, best_step: int | None) -> None:
        """`best.pt` names the checkpoint of that step, where it is on the disk; for the start of a run."""
        if best_step is not None and (path := checkpoint_path(self.directory, best_step)).exists():
            link("best.pt", path)

    def point_last_to_best(self) -> None:
        """From now on, until the next save, `last.pt` names what `best.pt` names."""
        link("last.pt", (self.directory / "best.pt").resolve())

    def set_aside(self, after: int) -> list[Path]:
        """Moves the checkpoints of later steps to `abandoned/`, with a copy of the metrics, and returns their names
        there; when nobody writes."""
        return checkpoint_files.set_aside(self.directory, after)

    def set_metrics_aside(self) -> Path | None:
        """Moves the metrics of a run whose checkpoints were removed to `abandoned/`; their name there, if any."""
        return checkpoint_files.set_metrics_aside(self.directory)

    def tidy(self) -> None:
        """Removes what killed processes left behind; for the start of a run, when nobody writes."""
        checkpoint_files.tidy(self.directory)

    # ------------------------------------------------------------------ the write

    def _ask_for_space(self, step: int, num_bytes: int) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.directory).free
        except OSError:
            return  # the write will meet it as well, and knows when to try again
        if free < num_bytes + SPARE_BYTES:
            raise SaveError(
                f"checkpoint of step {step} needs {human_size(num_bytes + SPARE_BYTES)}, "
                f"only {human_size(free)} are free at {self.directory}"
            )

    def _save(self, step: int, state: dict[str, Any], sidecar: dict[str, Any], best_step: int | None) -> None:
        path = checkpoint_path(self.directory, step)
        for wait in (*RETRY_WAITS_S, None):
            try:
                _write_checkpoint(path, state, sidecar)
                self.point_best_to(best_step)
                break
            except Exception as error:  # torch has its own for a failed write
                cause = _os_error(error)
                text = f"{type(error).__name__}: {error} ({path})" if cause is None else _what_and_where(cause, path)
                if cause is None or cause.errno not in TRANSIENT or wait is None:
                    failure = _failure(step, text)
                    failure.__cause__ = error
                    self._note(failure)
                    return
                log.warning("checkpoint of step %d: %s; trying again in %g s", step, text, wait)
                time.sleep(wait)
        self.saved_step = step
        try:
            checkpoint_files.prune(path, self.keep)
        except OSError as error:
            log.warning("older checkpoints could not be removed: %s", _what_and_where(error, self.directory))

    def _note(self, error: SaveError) -> None:
        log.error("%s", error)
        self._error.append(error)


def _failure(step: int, text: str) -> SaveError:
    return SaveError(f"checkpoint of step {step} could not be written: {text}")


def _what_and_where(error: OSError, path: Path | None = None) -> str:
    """The words of the system and the file they are about: the one a rename aims at, `path` where none is named."""
    where = error.filename2 or error.filename or path
    return f"{error.strerror or error} ({where})" if where else error.strerror or str(error)


def _write_checkpoint(path: Path, state: dict[str, Any], sidecar: dict[str, Any]) -> None:
    """A temporary name, flushed to the disk, then renamed: whenever it stops, nothing that was valid is harmed."""
    temporary = path.with_suffix(".pt.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as raw:
            file = _HashingFile(raw)
            torch.save(state, file)  # type: ignore[arg-type]  # all that it calls is there
            raw.flush()
            os.fsync(raw.fileno())
        # The sidecar comes first: a checkpoint without its checksum is not a valid one.
        write_sidecar(path, sidecar | {"sha256": file.sha256.hexdigest(), "bytes": file.num_bytes})
        move(temporary, path)
        link("last.pt", path)
    finally:
        for left in (temporary, path.with_suffix(".json.tmp")):
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)


class _HashingFile:
    """Checksums what is meant to be written while it is; what the disk made of it is for the reader to verify."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.num_bytes += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _os_error(error: BaseException | None) -> OSError | None:
    """torch.save hides the error of the disk behind one of its own: finds it in the chain of causes."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


# ---------------------------------------------------------------------- reading


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint of ours, on the CPU; runs no code from the file.

    Raises:
        ValueError: for a file that is missing, whose checksum does not hold, or that holds anything else than a state.
    """
    path = path.resolve()
    if not path.is_file():
        raise ValueError(f"resume={path}: there is no such checkpoint")
    problem = find_problem(path)
    if problem is not None:
        ours = checkpoint_files.read_sidecar(path) is not None or checkpoint_files.NAME.fullmatch(path.name)
        what = (
            "the checkpoint is damaged" if ours else "not a checkpoint of a run, or a copy without what lay beside it"
        )
        raise ValueError(f"resume={path}: {what}: {problem}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each have their own
        raise ValueError(
            f"resume={path}: not a checkpoint of a run; it holds other things than tensors and plain types, "
            f"which are not loaded ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"resume={path}: not a checkpoint of a run; it holds a {type(state).__name__}, not a state")
    return state


# ---------------------------------------------------------------------- states


def check_plain(value: object, name: str) -> None:
    """Raises `TypeError` unless `value` is made of tensors, dictionaries, lists, tuples and plain values."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_plain(key, f"{name} key {key!r}")
            check_plain(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple) and type(value) in (list, tuple):
        for position, item in enumerate(value):
            check_plain(item, f"{name}[{position}]")
    elif type(value) not in (Tensor, torch.nn.Parameter, str, int, float, bool, type(None)):
        raise TypeError(f"{name} is a {type(value).__name__}; checkpoints hold only tensors and plain types")


def _snapshot(value: Any) -> Any:
    """The same with every tensor copied to the host."""
    if isinstance(value, dict):
        return {key: _snapshot(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_snapshot(item) for item in value)
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
    elif isinstance(value, Tensor):
        yield value
