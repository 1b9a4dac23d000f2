"""Trials on this machine: several at once, behind a process of their own."""

import contextlib
import os
import secrets
import shlex
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import Literal

from dino.sweep import background
from dino.sweep.attempts import now
from dino.sweep.cluster import Cluster, Live
from dino.sweep.job import LOCK
from dino.sweep.locks import holder_of
from dino.sweep.manifest import Manifest, Submission, Trial
from dino.sweep.pool import is_alive, supervisor_command, waiting

CORES_PER_TRIAL = 4  # a small network hardly trains faster on more


class LocalCluster(Cluster):
    """A bounded pool on this machine; the trials outlive the terminal, and the process that starts them.

    Args:
        devices: GPUs as CUDA_VISIBLE_DEVICES names them; `auto`: those of CUDA_VISIBLE_DEVICES, else all that
            `nvidia-smi` lists. Each trial sees exactly one. Without any, trials share the CPU.
        trials_per_device: so many at once on each GPU.
        trials_on_cpu: so many at once where no GPU is used; None: one for every 4 cores.
        threads_per_trial: OMP_NUM_THREADS of each; None: as it is set, else its share of the cores.

    Raises:
        ValueError: naming the key, for a count below 1.
    """

    def __init__(
        self,
        devices: Literal["auto"] | list[int | str] = "auto",
        trials_per_device: int = 1,
        trials_on_cpu: int | None = None,
        threads_per_trial: int | None = None,
    ) -> None:
        counts = {"trials_per_device": trials_per_device, "trials_on_cpu": trials_on_cpu}
        for key, count in {**counts, "threads_per_trial": threads_per_trial}.items():
            if count is not None and count < 1:
                raise ValueError(f"cluster.{key}={count}: use a whole number of at least 1")
        if devices != "auto" and len(set(map(str, devices))) < len(devices):
            raise ValueError(
                f"cluster.devices={devices}: list each once; cluster.trials_per_device=2 shares each by two"
            )
        self.devices = devices
        self.trials_per_device = trials_per_device
        self.trials_on_cpu = trials_on_cpu
        self.threads_per_trial = threads_per_trial

    def slots(self) -> list[str | None]:
        """The device of each trial that may run at once; None: no device of its own."""
        devices = visible_devices() if self.devices == "auto" else [str(device) for device in self.devices]
        if devices:
            return [*devices] * self.trials_per_device
        return [None] * (self.trials_on_cpu or max(1, len(os.sched_getaffinity(0)) // CORES_PER_TRIAL))

    def num_threads(self, num_slots: int) -> int | None:
        """OMP_NUM_THREADS of a trial where so many run at once; None: as the environment says."""
        if self.threads_per_trial is None and "OMP_NUM_THREADS" in os.environ:
            return None
        return self.threads_per_trial or max(1, len(os.sched_getaffinity(0)) // num_slots)

    def check(self) -> None:
        """Any machine will do."""

    def submit(self, manifest: Manifest, trials: Sequence[Trial], snapshot: int) -> None:
        add_submission(manifest, trials, snapshot)
        background.ensure_running(manifest)

    def live(self, manifest: Manifest) -> Mapping[str, Live] | None:
        host = background.host_of(manifest)
        alive = [trial.id for trial in manifest.trials if is_alive(manifest.directory(trial))]
        if host not in (None, socket.gethostname()) and (alive or background.is_running(manifest)):
            return None
        live: dict[str, Live] = {}
        if background.is_running(manifest):
            live = {trial.id: Live(state="pending", reason="waits for a free slot") for trial, _ in waiting(manifest)}
        return live | {trial_id: Live(state="running", host=host) for trial_id in alive}

    def cancel(self, manifest: Manifest, trials: Sequence[Trial]) -> None:
        """Those that run finish their step, save, and end; one that does not is left alone.

        Raises:
            ValueError: they run on another machine.
        """
        host = background.host_of(manifest)
        if host not in (None, socket.gethostname()):
            raise ValueError(f"{manifest.folder}: its trials run on {host}; cancel them there")
        for trial in trials:
            supervisor = holder_of(manifest.directory(trial) / LOCK)
            if supervisor is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(supervisor, signal.SIGTERM)

    def scripts(self, manifest: Manifest, trials: Sequence[Trial]) -> list[str]:
        return [shlex.join(supervisor_command(manifest, trial, "SUBMISSION")) for trial in trials]


def add_submission(manifest: Manifest, trials: Sequence[Trial], snapshot: int) -> Submission:
    """Written at once."""
    submission = Submission(secrets.token_hex(8), now(), [trial.id for trial in trials], snapshot)
    manifest.submissions.append(submission)
    manifest.write()
    return submission


def visible_devices() -> list[str]:
    """The GPUs of CUDA_VISIBLE_DEVICES if it is set, else all that `nvidia-smi` lists."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [device for device in chosen.replace(" ", "").split(",") if device not in ("", "-1", "NoDevFiles")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(number) for number in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]
