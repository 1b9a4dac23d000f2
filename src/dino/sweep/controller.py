"""`python -m dino.sweep.controller SWEEP`: what goes on behind a sweep between its submission and its last trial.

It runs the local pool and the asynchronous search. All that it knows it reads from the sweep's folder, so it may be
killed at any moment: the trials go on, and another controller takes up where this one was.
"""

import contextlib
import sys
import time
import traceback
from pathlib import Path

from dino.code import REPOSITORY
from dino.sweep.background import LOCK, write_record
from dino.sweep.cluster import Cluster
from dino.sweep.clusters import cluster_of
from dino.sweep.freeze import SEARCH
from dino.sweep.local import LocalCluster
from dino.sweep.manifest import LOCK as SWEEP_LOCK
from dino.sweep.manifest import MANIFEST, Manifest, lock
from dino.sweep.pool import Pool
from dino.sweep.search import Search

LOCAL_EVERY_S = 0.25
SCHEDULER_EVERY_S = 5.0  # a question to squeue each time
SCHEDULER_PATIENCE_S = 60.0  # files written on another machine may be seen that much later
SHORTAGE_WAIT_S = 5.0
DEFAULT_LIMIT = 4  # trials of a search at once where a scheduler would take any number: the fewer, the more it learns


class Controller:
    """The pool, the search, or both, of one sweep."""

    def __init__(self, folder: Path) -> None:
        self.manifest = _read(folder)
        self._version: object = None
        cluster: Cluster = cluster_of(self.manifest)
        limit = self.manifest.sweep.get("max_parallel")
        patience_s = SCHEDULER_PATIENCE_S
        self.every_s = SCHEDULER_EVERY_S
        self.pool: Pool | None = None
        if isinstance(cluster, LocalCluster):
            slots = cluster.slots()[:limit]
            self.pool = Pool(self.manifest, slots, cluster.num_threads(len(slots)))
            self.every_s, patience_s, limit = LOCAL_EVERY_S, 0.0, len(slots)
        self.search: Search | None = None
        if self.manifest.sweep.get("search") == SEARCH:
            snapshot = _own_snapshot(self.manifest)
            self.search = Search(self.manifest, cluster, snapshot, limit or DEFAULT_LIMIT, patience_s)

    def step(self) -> bool:
        """Does what can be done now; False once nothing is left.

        Raises:
            OSError: the machine is short of something, such as processes or room; another controller is to go on.
        """
        if not self.is_up_to_date():
            self._version = self._version_on_disk()
            self.manifest = _read(self.manifest.folder)
            if self.pool is not None:
                self.pool.read(self.manifest)
        searching = self.search is not None and self.search.step(self.manifest)
        running = self.pool is not None and self.pool.step(self.manifest)
        return searching or running

    def is_up_to_date(self) -> bool:
        """Whether the manifest is still the one that was read."""
        return self._version == self._version_on_disk()

    def _version_on_disk(self) -> object:
        file = (self.manifest.folder / MANIFEST).stat()
        return file.st_mtime_ns, file.st_ino, file.st_size


def run(folder: Path) -> None:
    """Until nothing is left to do; at once if the sweep has a controller."""
    with lock(folder / LOCK) as alone:
        if alone is None:
            return
        write_record(folder)
        _say("begins")
        controller = None
        while True:
            try:
                controller = controller or Controller(folder)
                if not controller.step():
                    # Whoever submits holds this lock, and either comes before it is taken here, and is heard,
                    # or finds that there is no controller any more.
                    with lock(folder / SWEEP_LOCK) as held:
                        if held is not None and controller.is_up_to_date():
                            alone.close()
                            _say("ends: nothing is left to do")
                            return
                time.sleep(controller.every_s)
            except OSError:
                if not folder.is_dir():
                    return  # the sweep was deleted
                controller = None  # what it knows may not be what was written
                with contextlib.suppress(OSError):
                    traceback.print_exc()
                time.sleep(SHORTAGE_WAIT_S)


def _read(folder: Path) -> Manifest:
    """Raises `OSError` if the manifest cannot be read now; it is never half a file."""
    try:
        return Manifest.read(folder)
    except ValueError as error:
        raise OSError(str(error)) from None


def _own_snapshot(manifest: Manifest) -> int:
    """The snapshot that this process runs from; new points are composed with it, and so run with it too."""
    folders = [(manifest.folder / snapshot.folder).resolve() for snapshot in manifest.snapshots]
    return folders.index(REPOSITORY) if REPOSITORY in folders else len(folders) - 1


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} controller {text}", flush=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
