"""What a result is bound to: machine, versions, commit, date."""

import re
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.harness import NUM_CORES
from dino.runtime import choose_device, provenance

PACKAGES = ("python", "torch", "torchvision", "timm", "numpy")


def describe(device: str) -> dict[str, Any]:
    """Device, cores, memory [GiB], versions, commit and date; nothing that names the host."""
    known = provenance()
    return {
        "device": device_name(device),
        "cpu": cpu_name(),
        "cores": NUM_CORES,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "date": time.strftime("%Y-%m-%d"),
        "commit": known["commit"],
        "versions": {name: known[name] for name in PACKAGES} | lightly_version(),
    }


def device_name(device: str) -> str:
    """`NVIDIA H100`, or the CPU with the number of its cores."""
    chosen = choose_device(device)
    if chosen.type == "cuda":
        return torch.cuda.get_device_name(chosen)
    return f"{cpu_name()}, {NUM_CORES} cores"


def folder_name(device: str) -> str:
    """Where results of this device lie: `nvidia_h100`."""
    return re.sub(r"[^a-z0-9]+", "_", device_name(device).lower()).strip("_")


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """As the machine calls it; with family and model where a virtual machine calls all of a maker's alike."""
    about = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+?)\s*$", cpuinfo.read_text(), re.MULTILINE))
    name = about.get("model name", "unknown CPU")
    if any(letter.isdigit() for letter in name) or "cpu family" not in about:
        return name
    return f"{name} (family {about['cpu family']}, model {about['model']})"


def lightly_version() -> dict[str, str]:
    from importlib import metadata

    try:
        return {"lightly": metadata.version("lightly")}
    except metadata.PackageNotFoundError:
        return {"lightly": "not installed"}
