"""Contenders side by side: each in a process of its own, all alive at once, taking turns.

A round lets every contender make one sample, so that a machine that slows down slows all of them. Where a process has
luck with the places of its memory, which is worth some 5 %, only new processes show it: `generations`. `summary.py`
says what becomes of the samples.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.cores import round_trip_ns
from benchmarks.summary import summarise

ROOT = Path(__file__).resolve().parents[1]
CLOCK_TICKS_S = 0.03  # by which the kernel's counts may be off: it counts in hundredths of a second
MIN_CLEAN = 3  # samples; with fewer all are used, and the figure is marked
NUM_CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Contender:
    """Work to be measured: `make` is `module:function`, called with `settings` and the device."""

    name: str
    make: str
    settings: dict[str, Any] = field(default_factory=dict)
    threads: int = NUM_CORES
    ranks: int = 1


@dataclass(frozen=True)
class Sampling:
    """How long to measure."""

    rounds: int = 7
    budget_s: float = (
        240.0  # all rounds together take about so long at most; with fewer rounds if need be, but MIN_CLEAN
    )
    seconds: float = 1.0  # a sample repeats the work for about so long
    warmup: int = 2  # repetitions before the first that is timed
    generations: int = 1  # of processes, each with its share of the rounds
    device: str = "auto"
    max_threads: int = NUM_CORES


class ContenderError(RuntimeError):
    """A contender failed; the message ends with its traceback."""


class Unavailable(Exception):  # noqa: N818  reads as what it is
    """A contender cannot run here, for the reason given."""


class Running:
    """The process (or the ranks) of one contender."""

    def __init__(self, contender: Contender, device: str) -> None:
        self.contender = contender
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        specification = {
            "make": contender.make,
            "settings": contender.settings,
            "threads": contender.threads,
            "device": device,
        }
        command = [sys.executable, "-m", "benchmarks.contender", json.dumps(specification)]
        self._processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                cwd=ROOT,
                env=environment,
            )
            for environment in _environments(contender)
        ]

    def wait_until_ready(self) -> None:
        """Raises `Unavailable`, or `ContenderError` if its work could not be made."""
        self._answers()

    def ask(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        """The answer of every rank."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            process.stdin.flush()
        return self._answers()

    def sample(self, count: int, untimed: int) -> dict[str, Any]:
        """Seconds of `count` repetitions, how much of the machine others took meanwhile, and how far apart its cores
        were before and after."""
        pids = [process.pid for process in self._processes]
        apart = [round_trip_ns()]
        machine, own, started = _busy_seconds(), _tree_seconds(pids), time.perf_counter()
        answer, *_ = self.ask("run", count=count, untimed=untimed)
        wall = time.perf_counter() - started
        others = _busy_seconds() - machine - (_tree_seconds(pids) - own) - CLOCK_TICKS_S
        apart.append(round_trip_ns())
        return answer | {"others": max(0.0, others) / (wall * (os.cpu_count() or 1)), "cores_ns": apart}

    def memory(self) -> dict[str, float]:
        """Of all ranks together [MiB]."""
        answers = self.ask("memory")
        return {name: sum(answer[name] for answer in answers) for name in answers[0]}

    def end(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()  # type: ignore[union-attr]
        self._errors.close()

    def _answers(self) -> list[dict[str, Any]]:
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            answer = json.loads(line) if line else {"error": self._last_words(process)}
            if "unavailable" in answer:
                raise Unavailable(answer["unavailable"])
            if "error" in answer:
                raise ContenderError(f"{self.contender.name}: {answer['error']}")
            answers.append(answer)
        return answers

    def _last_words(self, process: subprocess.Popen[str]) -> str:
        code = process.wait()
        self._errors.seek(0)
        return f"ended with code {code}\n{self._errors.read()[-3000:]}"


def compare(
    name: str,
    contenders: Sequence[Contender],
    sampling: Sampling,
    *,
    per: float = 1.0,
    unit: str = "s",
    memory: str = "process",
    references: Sequence[str] = ("baseline",),
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures the contenders in turns.

    Args:
        name: of the comparison, as it stands above its table.
        per: what one repetition handles, in `unit` per second: 16 images, 3e9 operations; with unit `s` seconds.
        memory: which peak the table shows, `process` or `extra`; `none` where neither says anything.
        references: the contenders that the others are compared with.
        facts: what else belongs to the comparison, kept with it.
    """
    contenders = [replace(one, threads=min(one.threads, sampling.max_threads)) for one in contenders]
    share = replace(
        sampling,
        rounds=-(-sampling.rounds // sampling.generations),
        budget_s=sampling.budget_s / sampling.generations,
    )
    measured, left_out = _measure(contenders, share)
    for _ in range(1, sampling.generations):
        for one, found in _measure(contenders, share)[0].items():
            measured[one]["samples"] += found["samples"]
            of_all = measured[one]["memory_mib"]
            measured[one]["memory_mib"] = {key: max(of_all[key], found["memory_mib"][key]) for key in of_all}
    figures = summarise(measured, references, min(MIN_CLEAN, sampling.rounds))
    for contender in contenders:
        if contender.name in figures:
            figures[contender.name] |= {"threads": contender.threads, "ranks": contender.ranks}
    return {
        "name": name,
        "per": per,
        "unit": unit,
        "memory": memory,
        "references": [reference for reference in references if reference in figures],
        "facts": facts or {},
        "left_out": left_out,
        "contenders": figures,
    }


def _measure(contenders: Sequence[Contender], sampling: Sampling) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """`_take_turns` of new processes, and why some of the contenders cannot run."""
    started = {contender.name: Running(contender, sampling.device) for contender in contenders}
    running: dict[str, Running] = {}
    left_out: dict[str, str] = {}
    try:
        for one, process in started.items():
            try:
                process.wait_until_ready()
                running[one] = process
            except Unavailable as reason:
                left_out[one] = str(reason)
        return _take_turns(running, sampling), left_out
    finally:
        for process in started.values():
            process.end()


def _take_turns(running: dict[str, Running], sampling: Sampling) -> dict[str, dict[str, Any]]:
    """Of each contender: samples in the order of the rounds, memory and answer."""
    measured: dict[str, dict[str, Any]] = {}
    counts, memory, round_s = {}, {}, 0.0
    for name, process in running.items():
        (seconds,) = process.sample(1, untimed=sampling.warmup)["seconds"]
        counts[name] = max(1, round(sampling.seconds / seconds))
        round_s += counts[name] * seconds
        memory[name] = process.memory()
        measured[name] = {"threads": process.contender.threads, "samples": [], **process.ask("answer")[0]}
        process.ask("rest")
    cramped = _are_cramped(list(memory.values()))
    affordable = sampling.budget_s / (round_s * (2 if cramped else 1))
    for number in range(int(min(sampling.rounds, max(MIN_CLEAN, affordable)))):
        for name, process in running.items():
            # Who has given memory back needs a repetition to get it again.
            untimed = int(cramped or number == 0)
            measured[name]["samples"].append(process.sample(counts[name], untimed))
            if cramped:
                process.ask("rest")
    for name, process in running.items():
        measured[name]["memory_mib"] = process.memory()
    return measured


def _are_cramped(memory: list[dict[str, float]]) -> bool:
    """Whether what all keep between their turns might be too much for the one whose turn it is."""
    kept = sum(of_one["resident"] for of_one in memory)
    peak = max((of_one["process"] for of_one in memory), default=0.0)
    return kept + peak > 0.7 * min((of_one["total"] for of_one in memory), default=0.0)


def num_ranks(batch: int) -> int:
    """As many ranks as there are cores, at least two, where each gets the same share of a batch."""
    return max(ranks for ranks in range(1, max(2, NUM_CORES) + 1) if batch % ranks == 0)


def _environments(contender: Contender) -> list[dict[str, str]]:
    """The environment of each rank."""
    base = os.environ | {"OMP_NUM_THREADS": str(contender.threads), "LIGHTLY_DID_VERSION_CHECK": "True"}
    if contender.ranks == 1:
        return [base]
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": str(contender.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [base | together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(contender.ranks)]


def _busy_seconds() -> float:
    """What all processes of the machine have computed so far, and what a hypervisor gave to others."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # they are part of user and nice
    return float(sum(times) - idle - guest)


def _tree_seconds(pids: Sequence[int]) -> float:
    """What these processes, their descendants and this process have computed so far."""
    seconds = time.process_time()
    for pid in pids:
        process = psutil.Process(pid)
        for member in [process, *process.children(recursive=True)]:
            try:
                seconds += sum(member.cpu_times()[:4])
            except psutil.NoSuchProcess:  # ended just now; its parent counts it
                continue
    return seconds
