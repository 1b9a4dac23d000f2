"""How much memory a run holds."""

import psutil
import torch

from dino.runtime import peak_memory_gib


def memory_statistics(device: torch.device) -> dict[str, float]:
    """`perf/peak_memory_gib` so far and `perf/process_memory_gib` (resident) now [GiB].

    On a GPU also what is allocated and what the allocator holds: `perf/memory_allocated_gib` and
    `perf/memory_reserved_gib`; the peak is the device's then. No call waits for the device.
    """
    statistics = {
        "perf/peak_memory_gib": peak_memory_gib(device),
        "perf/process_memory_gib": psutil.Process().memory_info().rss / 2**30,
    }
    if device.type == "cuda":
        statistics["perf/memory_allocated_gib"] = torch.cuda.memory_allocated(device) / 2**30
        statistics["perf/memory_reserved_gib"] = torch.cuda.memory_reserved(device) / 2**30
    return statistics
