"""Looking at a sweep on this machine from outside, and ending what a test has started."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from dino.sweep import background
from dino.sweep.clusters import cluster_of
from dino.sweep.job import LOCK
from dino.sweep.locks import holder_of
from dino.sweep.manifest import MANIFEST, Manifest
from dino.sweep.states import TrialState, trial_states


def details(manifest: Manifest) -> list[TrialState]:
    manifest = Manifest.read(manifest.folder)
    return list(trial_states(manifest, cluster_of(manifest)).values())


def states(manifest: Manifest) -> list[str]:
    return [state.state for state in details(manifest)]


def until(condition: Callable[[], object], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def controller_of(manifest: Manifest) -> int:
    pid: int = json.loads((manifest.folder / background.RECORD).read_text())["pid"]
    return pid


def kill_controller(manifest: Manifest) -> None:
    os.kill(controller_of(manifest), signal.SIGKILL)
    until(lambda: not background.is_running(manifest))


def most_at_once(spans: list[tuple[float, float]]) -> int:
    return max(sum(a <= begin < b for a, b in spans) for begin, _ in spans)


def lives(manifest: Manifest) -> list[tuple[float, float]]:
    """When each trial lived, as its program wrote down."""
    directories = [manifest.directory(trial) for trial in Manifest.read(manifest.folder).trials]
    return [tuple(json.loads((directory / "lived").read_text())) for directory in directories]


def end_all(folder: Path) -> None:
    """Whatever a test that failed has left running."""
    if not (folder / MANIFEST).exists():
        return
    manifest = Manifest.read(folder)
    background.stop(manifest)
    for trial in manifest.trials:
        supervisor = holder_of(manifest.directory(trial) / LOCK)
        if supervisor is not None and supervisor != os.getpid():
            os.kill(supervisor, signal.SIGKILL)
