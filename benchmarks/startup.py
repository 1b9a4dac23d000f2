"""How soon the command line answers, in fresh processes: help, a misspelt key, a bad value, and a first training step.

The first step is that of the quickstart (digits), on the device of these results, from the start of the process, as the
run itself says (`perf/first_step_s`). Time of a first start on a machine, when files are not yet in its memory, is
longer.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT, Contender, compare
from benchmarks.options import Options

COMMANDS: dict[str, tuple[list[str], int]] = {  # with the exit code that they must have
    "--help": (["--help"], 0),
    "a misspelt key": (["loss.techer_temp=0.07"], 2),
    "a bad value": (["trainer.epochs=0"], 2),
}
FIRST_STEP = ["evaluation=[]", "trainer.max_steps=1"]


def measure(options: Options) -> list[dict[str, Any]]:
    contenders = [
        Contender(name, "benchmarks.startup:Command", {"words": words, "exit_code": code})
        for name, (words, code) in COMMANDS.items()
    ]
    words = [*FIRST_STEP, f"trainer.device={options.device}"]
    contenders.append(Contender("first step", "benchmarks.startup:FirstStep", {"words": words}))
    sampling = options.sampling(device="cpu")  # who starts them is there
    return [compare("python train.py ...", contenders, sampling, memory="none", references=())]


class Command:
    """A command that ends with `exit_code`."""

    def __init__(self, device: torch.device, words: list[str], exit_code: int) -> None:
        self.words, self.exit_code = words, exit_code

    def __call__(self) -> None:
        run_training(self.words, self.exit_code)

    def answer(self) -> None:
        return None


class FirstStep:
    """A new run; gives the seconds to its first step."""

    def __init__(self, device: torch.device, words: list[str]) -> None:
        self.words = words

    def __call__(self) -> float:
        with tempfile.TemporaryDirectory(prefix="startup_") as folder:
            run_training([*self.words, f"run_dir={folder}/run"])
            return first_step_s(Path(folder) / "run")

    def answer(self) -> None:
        return None


def run_training(words: list[str], exit_code: int = 0) -> None:
    """`python train.py WORDS`, in a directory without anything."""
    with tempfile.TemporaryDirectory(prefix="working_directory_") as folder:
        command = [sys.executable, str(ROOT / "train.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ)
    assert done.returncode == exit_code, f"{command} ended with {done.returncode}: {done.stderr[-2000:]}"


def first_step_s(run: Path) -> float:
    """What the newest process of the run needed from its start to the end of its first step [s]."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float([line["perf/first_step_s"] for line in lines if "perf/first_step_s" in line][-1])
