"""A working copy of the repository to submit sweeps from, edit and break; for the tests of whole sweeps."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line import REPOSITORY, TINY, finish, spawn

from dino.sweep.manifest import Manifest, Trial
from dino.sweep.states import UNDER_WAY

SHORT = [*TINY, "trainer.save_every_steps=2", "dataset.batch_size=32", "evaluation.knn.pixel_baseline=false"]

MISBEHAVING = '''
"""A user's own loss, with a mistake in it."""
import os, signal

from dino.loss import DINOLoss


class Misbehaving(DINOLoss):
    def __init__(self, how, centering, student_temp, weighting, local_weight, koleo_weight, implementation):
        super().__init__(centering, student_temp, weighting, local_weight, koleo_weight, implementation)
        self.how, self.count = how, 0

    def forward(self, *args, **options):
        terms = super().forward(*args, **options)
        self.count += 1
        if self.count == 5:
            terms = getattr(self, self.how)(terms)
        return terms

    def nothing(self, terms):
        return terms

    def fine(self, terms):
        return terms

    def raises(self, terms):
        raise RuntimeError("prototypes went missing")

    def is_killed(self, terms):
        os.kill(os.getpid(), signal.SIGKILL)

    def has_no_memory(self, terms):
        os._exit(137)

    def is_nan(self, terms):
        self.count -= 1
        terms.total.data.mul_(float("nan"))
        return terms
'''


@dataclass(frozen=True)
class WorkingCopy:
    """`python sweep.py` and `python train.py` of a copy of the repository, in an environment."""

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def make(cls, folder: Path, environment: Mapping[str, str] | None = None) -> "WorkingCopy":
        for name in ("src", "conf"):
            shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("train.py", "sweep.py"):
            shutil.copy(REPOSITORY / name, folder)
        (folder / "mine").mkdir()
        (folder / "mine" / "misbehaving.py").write_text(MISBEHAVING)
        path = f"{folder / 'src'}:{folder / 'mine'}:{REPOSITORY / 'tests'}"
        return cls(folder, {**(environment or {}), "PYTHONPATH": path})

    def start(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        return spawn([sys.executable, *words], cwd=self.folder, environment={**self.environment, **variables})

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return finish(self.start(*words, **variables))

    def sweep(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command of sweep.py that must succeed."""
        result = self.run("sweep.py", *words, **variables)
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
        return result

    def submit(self, *words: str, name: str = "s", **variables: str) -> Manifest:
        self.sweep("submit", f"sweep.dir={name}", *words, **variables)
        return Manifest.read(self.folder / name)

    def statuses(self, manifest: Manifest) -> dict[str, dict[str, Any]]:
        """Trial id -> what `collect` says of it in results.json."""
        result = self.run("sweep.py", "collect", str(manifest.folder))
        assert result.returncode in (0, 1, 75), result
        content = json.loads((manifest.folder / "results.json").read_text())
        return {line["trial"]: line for line in content["trials"]}

    def states(self, manifest: Manifest) -> dict[str, str]:
        return {trial: line["state"] for trial, line in self.statuses(manifest).items()}

    def wait(self, manifest: Manifest, timeout: float = 300) -> dict[str, str]:
        """Waits until nothing is under way; the states."""
        deadline = time.monotonic() + timeout
        while True:
            states = self.states(manifest)
            if not any(state in UNDER_WAY for state in states.values()):
                return states
            assert time.monotonic() < deadline, states
            time.sleep(1)


def table(manifest: Manifest) -> list[dict[str, str]]:
    """The lines of results.csv."""
    with (manifest.folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def until(condition: Callable[[], object], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def step_of(manifest: Manifest, trial: Trial) -> int:
    try:
        return int(json.loads((manifest.directory(trial) / "status.json").read_text())["step"])
    except (OSError, ValueError, KeyError):
        return -1


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def squeue(slurm: Mapping[str, str], field: str) -> list[str]:
    """One field of every job or array task that waits or runs."""
    words = ["squeue", "-h", "-r", "-o", field]
    return subprocess.run(words, env=slurm, capture_output=True, text=True, check=True).stdout.split()
