"""What a run stands on: device, precision, seeds, provenance. Nothing here knows the method."""

import contextlib
import ctypes
import gc
import os
import platform
import re
import resource
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dino import code

AUTOCAST_TYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """`auto` is a CUDA device if there is one, otherwise the CPU; the ranks of one machine take one GPU each.

    A launcher may show each rank only its own GPU, hence the remainder.

    Raises:
        ValueError: for `cuda` on a machine without a usable CUDA device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"trainer.device={device}: torch sees no CUDA device here; use auto or cpu")
    if device == "cuda":
        chosen = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(chosen)
        return chosen
    return torch.device(device)


def reuse_freed_memory(reuse: bool = True) -> None:
    """Whether the CPU's allocator keeps the large blocks that it gets back for the next step.

    Given back to the system, every large tensor of every step is mapped anew, zeroed and faulted in page by page; kept,
    they lie in pieces that the next tensor may not fit into, so a step holds more than it needs. Only glibc is told;
    elsewhere nothing happens. Constants: malloc.h.
    """
    max_mapped, trim_threshold, map_threshold = -4, -1, -3
    keep = {max_mapped: 0, trim_threshold: 2**31 - 1}
    give_back = {max_mapped: 2**16, trim_threshold: 2**17, map_threshold: 2**18}
    settings = keep if reuse else give_back
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in settings.items():
            libc.mallopt(parameter, value)
        if not reuse:
            libc.malloc_trim(0)  # what was kept until now


@contextlib.contextmanager
def what_lives_stays() -> Iterator[None]:
    """Inside, Python does not search again and again for garbage among the objects that there are already: those of
    all libraries are hundreds of thousands, and 2 % of the time of a small network's step."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass(frozen=True)
class Precision:
    """The number format of the forward passes; parameters, loss and optimizer stay in the parameters' own type.

    `tf32` is float32 whose products a GPU rounds to 10 bits of mantissa before it adds them up in float32.
    """

    name: str
    device: torch.device

    @classmethod
    def choose(cls, name: str, device: torch.device) -> "Precision":
        """`auto`: bf16 where the hardware has it, otherwise fp16 on a GPU and fp32 on a CPU.

        Raises:
            ValueError: for an unknown name, or for fp16 on a CPU, where no gradient scaler protects it.
        """
        if name == "auto":
            name = _automatic_precision(device)
        if name not in AUTOCAST_TYPES:
            raise ValueError(f"trainer.precision={name}: use auto, {', '.join(AUTOCAST_TYPES)}")
        if name == "fp16" and device.type == "cpu":
            raise ValueError("trainer.precision=fp16 is for GPUs; on a CPU use bf16 or fp32")
        if name == "tf32" and device.type == "cpu":
            raise ValueError("trainer.precision=tf32 is for GPUs; on a CPU use bf16 or fp32")
        return cls(name, device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Around the forward passes of the networks."""
        dtype = AUTOCAST_TYPES[self.name]
        return self.products() if dtype is None else torch.autocast(self.device.type, dtype)

    @contextlib.contextmanager
    def products(self) -> Iterator[None]:
        """Around passes of the networks, both ways. TF32 is a switch of the whole process, but losses, colours
        and nearest neighbours multiply exactly.
        """
        if self.name != "tf32":
            yield
            return
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision("highest")


def _automatic_precision(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # Without these instructions bf16 on a CPU is emulated and slower than fp32.
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if has_bf16 else "fp32"


def set_seeds(seed: int, rank: int = 0) -> None:
    """Seeds the global generators, differently on every rank.

    They serve initialisation and drop path only; sample order and views come from `augmentation.randomness`.
    The original seeds every rank alike (utils.py, fix_random_seeds), so all of them drew the same drop-path masks.
    """
    torch.manual_seed(seed * 100_003 + rank)


def rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far [GiB]: of the CUDA allocator on a GPU, of the process (resident) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 2**20
    # Of Linux, this begins at the peak of the process that started this one, and a notebook that starts runs is large.
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    count = torch.get_num_threads()
    return f"cpu ({count} thread{'s' if count > 1 else ''})"


def provenance() -> dict[str, str]:
    """Commit, versions and host of this process, for `status.json` and the checkpoints."""
    packages = ("torch", "torchvision", "timm", "hydra-core", "numpy")
    return {
        "commit": code.commit(),
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }
