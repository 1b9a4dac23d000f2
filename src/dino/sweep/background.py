"""The controller of a sweep, seen from outside: one process that outlives the terminal; started, found, stopped."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dino.run import write_json
from dino.sweep.attempts import now
from dino.sweep.environment import cleaned
from dino.sweep.locks import holder_of
from dino.sweep.manifest import Manifest
from dino.sweep.pool import with_code

LOCK = "jobs/controller.lock"
RECORD = "jobs/controller.json"
LOG = "jobs/controller.log"
START_WAIT_S = 30
STOP_WAIT_S = 10

_own: set[Path] = set()  # the sweep whose controller this process is


def ensure_running(manifest: Manifest) -> None:
    """Starts the controller, from the newest snapshot, unless there is one; called inside `manifest.locked()`.

    Raises:
        ValueError: it ended as soon as it was started.
    """
    if is_running(manifest):
        return
    (manifest.folder / "jobs").mkdir(exist_ok=True)
    code = manifest.folder / manifest.snapshots[-1].folder
    with (manifest.folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dino.sweep.controller", str(manifest.folder)],
            cwd=manifest.cwd,
            env=with_code(cleaned(os.environ), code),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_WAIT_S
    while not is_running(manifest) and time.monotonic() < deadline:
        if process.poll() == 0:
            return  # there was nothing left to do
        if process.poll() is not None:
            raise ValueError(f"{manifest.folder}: its controller ended with {process.returncode}; {LOG} says why")
        time.sleep(0.02)


def stop(manifest: Manifest) -> None:
    """Ends the controller: no further trial begins; those that run go on.

    Raises:
        ValueError: it runs on another machine.
    """
    if not is_running(manifest):
        return
    host = host_of(manifest)
    if host != socket.gethostname():
        raise ValueError(f"{manifest.folder}: its controller runs on {host}; stop it there")
    process = holder_of(manifest.folder / LOCK)
    if process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + STOP_WAIT_S
    while is_running(manifest) and time.monotonic() < deadline:
        time.sleep(0.02)


def is_running(manifest: Manifest) -> bool:
    """Also true inside the controller itself, which must not even ask: closing the file would let go of its lock."""
    return manifest.folder in _own or holder_of(manifest.folder / LOCK) is not None


def host_of(manifest: Manifest) -> str | None:
    """The machine on which the controller runs, or ran last; None if there was none."""
    host: str | None = _record(manifest).get("host")
    return host


def write_record(folder: Path) -> None:
    """This process is the controller; to be called once it holds the lock."""
    _own.add(folder)
    write_json(folder / RECORD, {"pid": os.getpid(), "host": socket.gethostname(), "time": now()})


def _record(manifest: Manifest) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((manifest.folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return record
