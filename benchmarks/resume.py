"""What it costs that a run can be stopped and watched: going on from a checkpoint, saving one, measuring statistics.

`new run` and `resumed run` are the seconds from the start of the process to the end of its first step, of ViT-S/16 with
65,536 prototypes and 2 images a step; the checkpoint is read, its checksum verified and everything restored. Saving
(on the CPU, whatever the device) and statistics are measured by `checkpoint_cost.py` and `statistics_cost.py`, which
say what their figures mean.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT, Contender, compare
from benchmarks.options import Options
from benchmarks.startup import first_step_s, run_training
from benchmarks.views import write_photos

SAVING = ("step_s", "held_s", "extra_s", "write_s", "share")
WATCHING = ("step_s", "look_s", "share")


def measure(options: Options) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="resume_") as folder:
        write_photos(Path(folder) / "photos", None, 4)
        words = [
            *("dataset=folder", f"dataset.root={folder}/photos", "dataset.batch_size=2", "dataset.num_workers=0"),
            *("backbone=vit_s16", "head.out_dim=65536", "augmentation.num_local_views=0", "evaluation=[]"),
        ]
        if options.quick:
            words = ["evaluation=[]"]
        words.append(f"trainer.device={options.device}")
        contenders = [
            Contender("new run", "benchmarks.startup:FirstStep", {"words": [*words, "trainer.max_steps=1"]}),
            Contender("resumed run", "benchmarks.resume:Resumed", {"words": words}),
        ]
        sampling = options.sampling(rounds=5, device="cpu")  # who starts them is there
        comparison = compare("First step of a process", contenders, sampling, memory="none", references=())
    small = ["--backbone", "vit_t16", "--out-dim", "256", "--pairs", "1"] if options.quick else []
    saved = _script("checkpoint_cost", small)
    saving = {f"{saved['backbone']}, {saved['out_dim']:,} prototypes": saved}
    settings = ["quickstart"] if options.quick else ["quickstart", "vit_s16"]
    pairs = ["--pairs", "1"] if options.quick else ["--pairs", "3"]
    device = ["--device", options.device]
    watching = {setting: _script("statistics_cost", [setting, *pairs, *device]) for setting in settings}
    return [comparison, _table("Saving, on the CPU", SAVING, saving), _table("Statistics", WATCHING, watching)]


class Resumed:
    """Goes on for one step each time, from the checkpoint of the time before."""

    def __init__(self, device: torch.device, words: list[str]) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="resumed_")
        self.run = Path(self.folder.name) / "run"
        self.words = [*words, f"run_dir={self.run}", "trainer.save_every_steps=1", "trainer.epochs=1000"]
        self.steps = 0
        self()

    def __call__(self) -> float:
        self.steps += 1
        run_training([*self.words, f"trainer.max_steps={self.steps}"])
        return first_step_s(self.run)

    def answer(self) -> None:
        return None


def _script(name: str, words: list[str]) -> dict[str, Any]:
    """The line of JSON that a script of this folder prints."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-3000:]}")
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


def _table(name: str, figures: tuple[str, ...], measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    rows = [[of, *(f"{printed[figure]:.3g}" for figure in figures)] for of, printed in measured.items()]
    return {"name": name, "columns": ["", *figures], "rows": rows, "measured": measured}
