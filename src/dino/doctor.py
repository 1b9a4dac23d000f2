"""`dino doctor`: what this machine and this installation have, what is wrong, and how to mend it."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig

from dino import code
from dino.checkpoint_files import human_size
from dino.validation import takes_files

Verdict = Literal["good", "note", "wrong"]

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "hydra-core",
    "omegaconf",
    "submitit",
    "wandb",
    "tensorboard",
    "transformers",
    "onnxruntime",
)
REQUIRED = ("torch", "torchvision", "timm", "hydra-core", "omegaconf")
LITTLE_DISK = 5 * 2**30  # [bytes]
LITTLE_MEMORY = 4 * 2**30
LITTLE_SHARED_MEMORY = 2**30
COMMAND_TIMEOUT_S = 10


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do where it is not good."""

    verdict: Verdict
    subject: str
    found: str
    advice: str = ""


def examine(config: DictConfig) -> Iterator[Finding]:
    """Findings about this machine, for the run that `config` describes, as they are made."""
    parts = {"versions": _versions, "device": _device, "machine": _machine, "disk": _disk, "Slurm": _slurm}
    for name, part in {**parts, "trackers": _trackers, "data": _data}.items():
        try:
            yield from part(config)
        except Exception as error:  # whatever is broken here is what somebody came to hear of
            yield Finding("wrong", name, f"{type(error).__name__}: {error}", "")


def _versions(config: DictConfig) -> Iterator[Finding]:
    python = f"{platform.python_version()} ({sys.executable})"
    fits = (3, 11) <= sys.version_info[:2] < (3, 14)
    yield Finding("good" if fits else "wrong", "python", python, "" if fits else "use Python 3.11, 3.12 or 3.13")
    for name in PACKAGES:
        try:
            yield Finding("good", name, metadata.version(name))
        except metadata.PackageNotFoundError:
            needed = name in REQUIRED or name in config.logger
            advice = "make clean, then make install" if name in REQUIRED else f"pip install {name}"
            yield Finding("wrong" if needed else "note", name, "not installed", advice)
    commit = code.commit()
    advice = "results of uncommitted code cannot be repeated: commit first" if commit.endswith("+changes") else ""
    yield Finding("note" if advice else "good", "commit", commit, advice)


def _device(config: DictConfig) -> Iterator[Finding]:
    import torch

    from dino.runtime import Precision, choose_device

    try:
        import torchvision.ops  # noqa: F401  fails where torch and torchvision are of different builds
    except Exception as error:
        advice = "install torch and torchvision of the same build: make clean, then make install"
        yield Finding("wrong", "torchvision", f"does not load with this torch ({error})", advice)
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            yield Finding("good", f"GPU {number}", f"{facts.name}, {human_size(facts.total_memory)}")
    elif shutil.which("nvidia-smi"):
        built = torch.version.cuda or "no CUDA"
        advice = "compare the driver (nvidia-smi) with the CUDA that torch was built for"
        yield Finding("wrong", "GPU", f"nvidia-smi is there, but torch (built for {built}) sees no device", advice)
    else:
        advice = "runs use the CPU: the quickstart and the small recipes take minutes, ImageNet needs a GPU"
        yield Finding("note", "GPU", "none", advice)
    try:
        precision = Precision.choose(config.trainer.precision, choose_device(config.trainer.device))
        chosen = f"trainer.precision={config.trainer.precision} is {precision.name} on {precision.device}"
        advice = ""
        if precision.name == "fp32" and config.trainer.precision == "auto":
            advice = "this CPU has no instructions for bf16"
        yield Finding("note" if advice else "good", "precision", chosen, advice)
    except ValueError as error:
        yield Finding("wrong", "precision", str(error))


def _machine(config: DictConfig) -> Iterator[Finding]:
    import psutil

    cores, of_machine = usable_cores(), os.cpu_count() or 1
    less = f" of {of_machine}: the rest is for others (taskset, cgroup or Slurm)" if cores < of_machine else ""
    yield Finding("good", "cores", f"{cores}{less}")
    workers = int(config.dataset.num_workers)
    advice = f"dataset.num_workers={cores} or fewer; dino data bench measures how many" if workers > cores else ""
    yield Finding("note" if advice else "good", "workers", f"dataset.num_workers={workers}", advice)
    memory = psutil.virtual_memory().available
    advice = "close other programs, or turn down dataset.batch_size" if memory < LITTLE_MEMORY else ""
    yield Finding("note" if advice else "good", "memory", f"{human_size(memory)} free", advice)
    shared = Path("/dev/shm")
    if workers and shared.is_dir():
        free = shutil.disk_usage(shared).free
        advice = "workers pass views through it: docker run --shm-size=8g" if free < LITTLE_SHARED_MEMORY else ""
        yield Finding("wrong" if advice else "good", "/dev/shm", f"{human_size(free)} free", advice)


def usable_cores() -> int:
    """Cores that this process may use: by its affinity, and by the quota of its cgroup, rounded up."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        return cores


def _disk(config: DictConfig) -> Iterator[Finding]:
    folder = Path(config.run_dir)
    while not folder.is_dir():
        folder = folder.parent
    if not takes_files(folder):
        yield Finding("wrong", "disk", f"{folder.resolve()} cannot be written", "set run_dir to a folder of yours")
        return
    free = shutil.disk_usage(folder).free
    advice = (
        "free some, or set run_dir to another disk; checkpoints of large networks take GBs"
        if free < LITTLE_DISK
        else ""
    )
    yield Finding(
        "note" if advice else "good", "disk", f"{human_size(free)} free for runs at {folder.resolve()}", advice
    )


def _slurm(_: DictConfig) -> Iterator[Finding]:
    if not shutil.which("sbatch"):
        yield Finding("note", "Slurm", "none here (no sbatch)", "sweeps run on this machine: cluster=local")
        return
    try:
        command = ["sinfo", "--noheader", "--format=%P %a %l %D"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        yield Finding("wrong", "Slurm", f"sinfo gave no answer in {COMMAND_TIMEOUT_S} s", "the controller may be down")
        return
    if "configuration source" in done.stderr:  # of no slurm.conf and no controller that would send one
        advice = "sweeps run on this machine: cluster=local; on a cluster set SLURM_CONF"
        yield Finding("note", "Slurm", "sbatch is here, but no cluster is configured", advice)
        return
    if done.returncode:
        yield Finding("wrong", "Slurm", done.stderr.strip() or "sinfo failed", "check SLURM_CONF and the controller")
        return
    partitions = "; ".join(" ".join(line.split()) for line in done.stdout.splitlines() if line.strip())
    yield Finding("good", "Slurm", f"partitions (state, time limit, nodes): {partitions or 'none'}")


def _trackers(config: DictConfig) -> Iterator[Finding]:
    if importlib.util.find_spec("wandb"):
        mode = os.environ.get("WANDB_MODE")
        if mode in ("offline", "disabled"):
            yield Finding("note", "wandb login", f"WANDB_MODE={mode}", "wandb sync uploads offline runs later")
        elif os.environ.get("WANDB_API_KEY") or _netrc_names("api.wandb.ai"):
            yield Finding("good", "wandb login", "a key is there")
        else:
            verdict: Verdict = "wrong" if "wandb" in config.logger else "note"
            yield Finding(verdict, "wandb login", "no key", "for logger=wandb: wandb login, or WANDB_MODE=offline")


def _netrc_names(host: str) -> bool:
    try:
        return host in (Path.home() / ".netrc").read_text()
    except (OSError, RuntimeError):
        return False


def _data(config: DictConfig) -> Iterator[Finding]:
    from dino.config import build

    try:
        dataset = build(config, "dataset")
        count, held_out = len(dataset.train()), dataset.evaluation()
    except ValueError as error:
        yield Finding("wrong", "data", str(error), "dino data check says more")
        return
    apart = "none held out" if held_out is None else f"{len(held_out[1]):,} held out"
    yield Finding("good", "data", f"{dataset.name}: {count:,} training images, {apart}")
