"""One contender in a process of its own: `python -m benchmarks.contender SPECIFICATION`, started by the harness.

It builds its work, then obeys one line of JSON at a time on standard input and answers each with one on standard
output: `run` repeats the work and gives the seconds of each repetition, `rest` gives memory back that the allocator
keeps, `answer` is a number to compare with those of the other contenders, `memory` the peak.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from benchmarks.harness import Unavailable
from dino import ranks
from dino.processes import Processes
from dino.runtime import choose_device, peak_memory_gib

MIB = 2**20


class Work(Protocol):
    """What a contender does again and again."""

    def __call__(self) -> Any:
        """One repetition; the seconds, as a float, where only a part of it counts."""

    def answer(self) -> Any:
        """What it found, as JSON has it: where contenders compute the same, a number on which they agree."""


class Process:
    """The commands; `make` builds the work from `settings`, among them the device."""

    def __init__(self, make: Callable[..., Work], settings: dict[str, Any]) -> None:
        self.device: torch.device = settings["device"]
        # Brings the libraries' own buffers before memory is looked at.
        self._calibrate()
        torch.zeros(64, 64, device=self.device, requires_grad=True).log_softmax(dim=-1).sum().backward()
        self.before_mib = self._now_mib()
        self.work = make(**settings)
        self.rest()  # what building freed would else be there for nothing
        self.prepared_mib = self._now_mib()
        _reset_peak(self.device)

    def run(self, count: int, untimed: int) -> dict[str, Any]:
        """Seconds of `count` repetitions after `untimed` ones, and of a fixed product before and after them."""
        for _ in range(untimed):
            self.work()
        calibration = [self._calibrate()]
        seconds = self._timed_together(count) if self.device.type == "cuda" else self._timed_one_by_one(count)
        calibration.append(self._calibrate())
        return {"seconds": seconds, "calibration_s": calibration}

    def _timed_one_by_one(self, count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            own = self.work()
            seconds.append(own if isinstance(own, float) else time.perf_counter() - started)
        return seconds

    def _timed_together(self, count: int) -> list[float]:
        """Waiting for the device once, as a training loop would: their mean."""
        self._wait()
        started = time.perf_counter()
        for _ in range(count):
            self.work()
        self._wait()
        return [(time.perf_counter() - started) / count]

    def rest(self) -> dict[str, Any]:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)
        return {}

    def answer(self) -> dict[str, Any]:
        return {"answer": self.work.answer()}

    def memory(self) -> dict[str, Any]:
        """[MiB] `process`: the most that the process (on CUDA: its tensors) ever had; `extra`: of that, what the work
        took beyond its prepared inputs; `resident`: what it has now; `total`: of the device."""
        peak, on_cuda = peak_memory_gib(self.device) * 1024, self.device.type == "cuda"
        return {
            "process": peak,
            "extra": peak - self.prepared_mib,
            "prepared": self.prepared_mib - self.before_mib,
            "resident": torch.cuda.memory_reserved(self.device) / MIB if on_cuda else self._now_mib(),
            "total": (torch.cuda.mem_get_info(self.device)[1] if on_cuda else psutil.virtual_memory().total) / MIB,
        }

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _calibrate(self) -> float:
        """Seconds of a product that is always the same: the best of three."""
        size = 4096 if self.device.type == "cuda" else 768
        matrix = torch.ones(size, size, device=self.device)
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            torch.mm(matrix, matrix)
            self._wait()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    def _now_mib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) / MIB
        return psutil.Process().memory_info().rss / MIB


def _reset_peak(device: torch.device) -> None:
    """Building may have taken more than working does."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    specification = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the work prints is no answer

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    torch.set_num_threads(specification["threads"])
    device = choose_device(specification["device"], int(os.environ.get("LOCAL_RANK", 0)))
    module, _, name = specification["make"].partition(":")
    try:
        with ranks.process_group(Processes.from_environment(), device):
            make = getattr(importlib.import_module(module), name)
            process = Process(make, {**specification["settings"], "device": device})
            say({"ready": True})
            for line in sys.stdin:
                command = json.loads(line)
                say(getattr(process, command.pop("do"))(**command))
    except Unavailable as reason:
        say({"unavailable": str(reason)})
    except Exception:
        say({"error": traceback.format_exc()})


if __name__ == "__main__":
    main()
