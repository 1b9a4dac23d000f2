"""The bounded pool of a machine: at most so many trials at once, each on a device of its own."""

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dino.run import LOCK as TRAINING_LOCK
from dino.run import read_status, write_json
from dino.sweep.attempts import End, now, read_attempts, record
from dino.sweep.job import LOCK as SUPERVISOR_LOCK
from dino.sweep.locks import holder_of
from dino.sweep.manifest import Manifest, Submission, Trial

DEVICES = "jobs/devices.json"


def is_alive(directory: Path) -> bool:
    """Whether a supervisor, or a training process that has lost its own, works on the trial."""
    return any(holder_of(directory / name) is not None for name in (SUPERVISOR_LOCK, TRAINING_LOCK))


def waiting(manifest: Manifest) -> Iterator[tuple[Trial, Submission]]:
    """The trials that were handed over and not begun, in the order in which they were."""
    trials = {trial.id: trial for trial in manifest.trials}
    newest = {trial_id: submission for submission in manifest.submissions for trial_id in submission.trials}
    for submission in manifest.submissions:
        for trial_id in submission.trials:
            if newest[trial_id] is submission and is_waiting(manifest, trials[trial_id], submission):
                yield trials[trial_id], submission


def is_waiting(manifest: Manifest, trial: Trial, submission: Submission) -> bool:
    """Whether this submission of the trial is still to be begun."""
    directory = manifest.directory(trial)
    if manifest.cancelled(trial) is not None or read_status(directory).get("state") == "finished":
        return False
    return all(attempt.submission != submission.id for attempt in read_attempts(directory))


def supervisor_command(manifest: Manifest, trial: Trial, submission_id: str) -> list[str]:
    """-P: `dino` comes from PYTHONPATH, which names the snapshot, not from the folder where it is started."""
    return [sys.executable, "-P", "-m", "dino.sweep.job", str(manifest.folder), trial.id, submission_id]


def with_code(environment: Mapping[str, str], code: Path) -> dict[str, str]:
    """The environment with `dino` imported from this copy of the code."""
    others = environment.get("PYTHONPATH")
    return {**environment, "PYTHONPATH": os.pathsep.join([str(code / "src"), *([others] if others else [])])}


@dataclass
class Child:
    trial: Trial
    submission: Submission
    device: str | None
    process: subprocess.Popen[bytes]


class Pool:
    """Begins what is handed over as soon as a slot is free.

    Trials that an earlier controller began go on without it; they keep their slots until they end.

    Args:
        slots: a device for each trial that may run at once; None where a trial has no device of its own.
        num_threads: of each trial; None: as the environment says.
    """

    def __init__(self, manifest: Manifest, slots: list[str | None], num_threads: int | None) -> None:
        self.slots = slots
        self.num_threads = num_threads
        self._queue: list[tuple[Trial, Submission]] = []
        self._children: dict[str, Child] = {}
        self._devices = manifest.folder / DEVICES
        earlier: dict[str, str | None] = {}
        with contextlib.suppress(OSError, ValueError):
            earlier = json.loads(self._devices.read_text())
        alive = [trial for trial in manifest.trials if is_alive(manifest.directory(trial))]
        self._inherited = {manifest.directory(trial): earlier.get(trial.id) for trial in alive}

    def read(self, manifest: Manifest) -> None:
        """To be called when the manifest has changed."""
        self._queue = list(waiting(manifest))

    def step(self, manifest: Manifest) -> bool:
        """Begins what can begin now; False once there is nothing to wait for.

        Raises:
            OSError: the machine is short of something, such as processes.
        """
        self._reap(manifest)
        self._inherited = {path: device for path, device in self._inherited.items() if is_alive(path)}
        free = self._free_slots()
        for entry in list(self._queue):
            trial, submission = entry
            if not free:
                break
            if trial.id in self._children or is_alive(manifest.directory(trial)):
                continue  # an attempt of before is on its way out
            if is_waiting(manifest, trial, submission):
                self._begin(manifest, trial, submission, free[0])
                free.pop(0)
            self._queue.remove(entry)
        return bool(self._children or self._queue)

    def _free_slots(self) -> list[str | None]:
        """Those of the least used devices first."""
        taken = [child.device for child in self._children.values()] + list(self._inherited.values())
        free = list(self.slots)
        for device in taken:
            with contextlib.suppress(ValueError):
                free.remove(device)
        load = Counter(taken)
        room = len(self.slots) - len(taken)  # less than are free, if one that was inherited had another device
        return sorted(free, key=lambda device: load[device])[: max(0, room)]

    def _begin(self, manifest: Manifest, trial: Trial, submission: Submission, device: str | None) -> None:
        running = {path.name: used for path, used in self._inherited.items()}
        running |= {child.trial.id: child.device for child in self._children.values()}
        write_json(self._devices, {**running, trial.id: device})
        environment = with_code(os.environ, manifest.code(submission))
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        if self.num_threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.num_threads)
        with (manifest.folder / "jobs" / f"{trial.id}.log").open("ab") as log:
            process = subprocess.Popen(
                supervisor_command(manifest, trial, submission.id),
                cwd=manifest.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children[trial.id] = Child(trial, submission, device, process)

    def _reap(self, manifest: Manifest) -> None:
        for child in [child for child in self._children.values() if child.process.poll() is not None]:
            if is_waiting(manifest, child.trial, child.submission):
                if child.process.returncode:
                    record(manifest.directory(child.trial), _never_began(child))
                else:  # another process worked on it
                    self._queue.append((child.trial, child.submission))
            del self._children[child.trial.id]


def _never_began(child: Child) -> End:
    """So that it is not begun again and again."""
    return End(
        time=now(),
        submission=child.submission.id,
        rank=0,
        exit_code=child.process.returncode,
        signal=None,
        out_of_memory=False,
        cause=None,
        requeued=False,
        reason=f"its supervisor ended before the trial began; see jobs/{child.trial.id}.log",
        step=0,
    )
