"""The manifest of a sweep: what was planned, which code it runs, and what was handed to the cluster.

outputs/sweeps/<name>/
  manifest.json         this file; written atomically, only ever added to
  code/, code_2/, ...   snapshots of the code, one for each time that trials were frozen with other code
  jobs/                 what submitit keeps, and the logs of the jobs
  <trial>/              a run directory as any other, and attempts.jsonl
"""

import contextlib
import fcntl
import getpass
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dino.run import write_json

MANIFEST = "manifest.json"
LOCK = ".lock"
LOCK_WAIT_S = 10
CANCELLED = "cancelled.json"


@dataclass(frozen=True)
class Trial:
    """One point of a sweep with one seed: a frozen config, and the directory that belongs to it alone.

    Attributes:
        id: name of its directory, `<number>_<first 8 digits of the fingerprint>`.
        fingerprint: of all settings that change results; it is what a trial *is*.
        settings: swept key -> value, without the seed.
        overrides: all overrides, so that `python train.py OVERRIDES` is this trial.
    """

    id: str
    fingerprint: str
    settings: dict[str, Any]
    seed: int
    overrides: list[str]


@dataclass(frozen=True)
class Snapshot:
    """The code that jobs run: a copy, so that later edits change nothing.

    Attributes:
        folder: relative to the sweep, such as `code`.
        digest: SHA-256 of all its files; a job refuses to run if it differs.
        commit: the git commit that it was taken from, with `+changes` where files differed; `unknown` outside git.
        source: the folder that was copied.
    """

    folder: str
    digest: str
    commit: str
    source: str


@dataclass
class Submission:
    """Trials that were handed over together. It is written before sbatch is called, and its jobs after.

    Attributes:
        id: stands in the job's comment, so that a job whose number was never written down is still found.
        jobs: trial id -> job id as squeue shows it (`1234_0`); empty while unknown, or where there is no scheduler.
    """

    id: str
    time: float
    trials: list[str]
    snapshot: int
    jobs: dict[str, str] = field(default_factory=dict)


@dataclass
class Manifest:
    """A sweep on disk. Commands change it only inside `locked()`, and only add to it.

    Attributes:
        folder: absolute path of the sweep; not part of the file, so that a sweep can be moved.
        command: as it was typed.
        cwd: where it was typed; relative paths of the config start there.
        user: who typed it, and alone may change the sweep.
        base: overrides common to all trials.
        sweep: the settings of conf/sweep, resolved.
        cluster: the settings of conf/cluster, resolved.
    """

    folder: Path
    name: str
    created: float
    command: list[str]
    cwd: str
    base: list[str]
    sweep: dict[str, Any]
    cluster: dict[str, Any]
    snapshots: list[Snapshot] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    submissions: list[Submission] = field(default_factory=list)
    user: str = field(default_factory=getpass.getuser)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises `ValueError` where there is no sweep, or its manifest cannot be read."""
        folder = folder.absolute()
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text())
            content["snapshots"] = [Snapshot(**item) for item in content["snapshots"]]
            content["trials"] = [Trial(**item) for item in content["trials"]]
            content["submissions"] = [Submission(**item) for item in content["submissions"]]
            return cls(folder=folder, **content)
        except FileNotFoundError:
            raise ValueError(f"{folder}: no sweep is here ({MANIFEST} is missing)") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: this is not the manifest of a sweep ({error!r})") from None

    def write(self) -> None:
        """Readers see the old file or the new one."""
        content = asdict(self)
        del content["folder"]
        write_json(self.folder / MANIFEST, content, durable=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the sweep for one command at a time; the manifest is read again, and written at the end.

        Raises:
            ValueError: another command is changing the sweep, or it belongs to somebody else.
        """
        if self.user != getpass.getuser():
            raise ValueError(f"{self.folder}: this sweep belongs to {self.user}; others may look at it, not change it")
        with lock(self.folder / LOCK, wait_s=LOCK_WAIT_S) as held:
            if held is None:
                raise ValueError(f"{self.folder}: another command is changing this sweep; try again when it has ended")
            self.__dict__.update(Manifest.read(self.folder).__dict__)
            yield
            self.write()

    # ------------------------------------------------------------------ looking things up

    def directory(self, trial: Trial) -> Path:
        """The run directory of a trial."""
        return self.folder / trial.id

    def trial(self, trial_id: str) -> Trial:
        """Raises `ValueError` for an unknown trial."""
        found = next((trial for trial in self.trials if trial.id == trial_id), None)
        if found is None:
            raise ValueError(f"{trial_id}: no such trial in {self.folder}; {MANIFEST} lists them")
        return found

    def last_submission(self, trial: Trial) -> Submission | None:
        """The newest submission that a trial was part of."""
        return next((item for item in reversed(self.submissions) if trial.id in item.trials), None)

    def code(self, submission: Submission) -> Path:
        """The snapshot that a submission runs."""
        return self.folder / self.snapshots[submission.snapshot].folder

    # ------------------------------------------------------------------ cancelling

    def mark_cancelled(self, trials: Sequence[Trial], reason: str) -> None:
        """From now on these trials are not started, and not requeued when they stop."""
        for trial in trials:
            self.directory(trial).mkdir(exist_ok=True)
            write_json(self.directory(trial) / CANCELLED, {"reason": reason})

    def cancelled(self, trial: Trial) -> str | None:
        """Why a trial was cancelled; None if it was not, or was resumed since."""
        try:
            reason: str = json.loads((self.directory(trial) / CANCELLED).read_text())["reason"]
        except (OSError, ValueError, KeyError):
            return None
        return reason

    def unmark_cancelled(self, trial: Trial) -> None:
        (self.directory(trial) / CANCELLED).unlink(missing_ok=True)


def refuse_without_locks(folder: Path) -> None:
    """Raises `ValueError` on a file system where nobody could tell whether a trial runs already."""
    try:
        with lock(folder / LOCK):
            return
    except OSError as error:
        raise ValueError(f"sweep.dir={folder}: this file system has no locks ({error}); choose another place") from None


@contextlib.contextmanager
def lock(path: Path, wait_s: float = 0) -> Iterator[TextIO | None]:
    """The lock file, held until the end of the block or of the process; None if another process keeps holding it."""
    deadline = time.monotonic() + wait_s
    with path.open("a") as file:
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                if time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                yield None
            else:
                yield file
            return
