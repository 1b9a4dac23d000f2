"""What watching a run costs: statistics, gradients by group, health and the log line, at the default log period.

    python benchmarks/statistics_cost.py quickstart
    python benchmarks/statistics_cost.py vit_s16

Blocks of `monitor.every_steps` steps with and without the logged step's statistics alternate, so that a machine that
slows down slows both. One JSON line:

    step_s     seconds a step without statistics (median over blocks)
    look_s     seconds by which a logged step with its statistics is longer than `step_s` (median)
    share      look_s / (every_steps * step_s)
    ratio      seconds of a block with statistics over the one before it (median over pairs); 1 + share but for noise
    pairs      the seconds of every pair of blocks
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dino.augmentation import ViewBatch
from dino.config import compose
from dino.run import Run
from dino.runtime import provenance
from dino.training import Trainer, assemble

SETTINGS = {
    "quickstart": ["trainer.num_threads=1"],
    "vit_s16": [
        *("backbone=vit_s16", "head.out_dim=65536", "head.hidden_dim=2048", "head.bottleneck_dim=256"),
        *("augmentation=multicrop", "augmentation.num_local_views=6", "dataset.batch_size=16", "loss.koleo_weight=0"),
        *("augmentation.global_size=224", "augmentation.local_size=96", "trainer.precision=bf16"),
    ],
}


def make_trainer(name: str, device: str, folder: Path) -> Trainer:
    words = ["evaluation=[]", "trainer.freeze_last_layer_epochs=0", "~logger.console", f"trainer.device={device}"]
    return assemble(compose([*SETTINGS[name], *words]), Run(folder, {}))


def random_views(trainer: Trainer) -> ViewBatch:
    made = trainer.augmentation
    batch, channels = trainer.loader.batch_size, trainer.dataset.channels
    return ViewBatch(
        global_views=torch.randn(2, batch, channels, made.global_size, made.global_size),
        local_views=torch.randn(made.num_local_views, batch, channels, made.local_size, made.local_size),
        indices=torch.arange(batch),
        labels=None,
        parameters=None,
        bad=(),
    ).to(trainer.device)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    trainer = make_trainer(options.setting, options.device, folder)
    views, every_steps = random_views(trainer), trainer.monitor.every_steps
    logged: list[float] = []

    def now() -> float:
        """Seconds, when the device has done all that it was given."""
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def block(watched: bool) -> float:
        started = now()
        for number in range(every_steps):
            observe = watched and number == every_steps - 1
            before = now() if observe else 0.0
            output = trainer.train_step(trainer.step, [views], observe=observe)
            trainer.step += 1
            if observe:
                trainer._log_statistics(output)
                logged.append(now() - before)
        return now() - started

    trainer._start()
    block(watched=True)  # warm, and brings the state of AdamW
    logged.clear()
    pairs = [{"without_s": block(watched=False), "with_s": block(watched=True)} for _ in range(options.pairs)]
    step_s = statistics.median(pair["without_s"] for pair in pairs) / every_steps
    look_s = statistics.median(logged) - step_s
    return {
        "step_s": round(step_s, 5),
        "look_s": round(look_s, 5),
        "share": round(look_s / (every_steps * step_s), 5),
        "ratio": round(statistics.median(pair["with_s"] / pair["without_s"] for pair in pairs), 4),
        "every_steps": every_steps,
        "pairs": [{name: round(value, 4) for name, value in pair.items()} for pair in pairs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--pairs", type=int, default=5, help="blocks without and with statistics")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="statistics_cost_") as folder:
        measured = measure(options, Path(folder))
    versions = {name: provenance()[name] for name in ("torch", "commit")}
    print(json.dumps(measured | {"setting": options.setting, "threads": torch.get_num_threads(), **versions}))


if __name__ == "__main__":
    main()
