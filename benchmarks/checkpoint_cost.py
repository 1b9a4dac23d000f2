"""What saving costs the training loop: ViT-S/16 with 65,536 prototypes on the CPU, AdamW, random views.

    python benchmarks/checkpoint_cost.py

Blocks of steps with and without a save in front alternate, so that a machine that slows down slows both. One JSON line:

    step_s          seconds a step, without a save (median over blocks)
    held_s          seconds for which `save` held the loop (median)
    extra_s         seconds by which a block with a save is longer than the one before it, without `held_s` (median)
    write_s         seconds from the return of `save` to the end of the write (median)
    share           (held_s + extra_s) / (every_steps * step_s), with a save every `every_steps` steps
    pairs           the seconds of every pair of blocks, from which the medians are taken
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from dino.augmentation import ViewBatch
from dino.config import build, compose
from dino.runtime import Precision, provenance, set_seeds
from dino.training.assemble import build_step
from dino.training.checkpoint import CheckpointStore
from dino.training.step import TrainStep


def make_step(options: argparse.Namespace) -> TrainStep:
    settings = [f"backbone={options.backbone}", f"head.out_dim={options.out_dim}", "optimizer=adamw"]
    config = compose(["dataset=imagenet", *settings])
    set_seeds(0)
    return build_step(config, build(config, "trainer"), Precision("fp32", torch.device("cpu")), 1000, options.batch)


def random_views(batch: int, num_local_views: int) -> ViewBatch:
    return ViewBatch(
        global_views=torch.randn(2, batch, 3, 224, 224),
        local_views=torch.randn(num_local_views, batch, 3, 96, 96) if num_local_views else None,
        indices=torch.arange(batch),
        labels=None,
        parameters=None,
        bad=(),
    )


def state_of(step: TrainStep) -> dict[str, Any]:
    """The tensors of `dino.training.state`."""
    return {
        "model": step.model.state_dict(),
        "loss": step.loss.state_dict(),
        "optimizer": step.optimizer.state_dict(),
    }


def measure(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    step, views = make_step(options), random_views(options.batch, options.local_views)
    store, numbers = CheckpointStore(directory, keep=1), iter(range(10**9))

    def block() -> float:
        started = time.perf_counter()
        for _ in range(options.block_steps):
            step(next(numbers), [views])
        return time.perf_counter() - started

    block()  # warm, and brings the state of AdamW
    pairs = []
    for pair in range(options.pairs):
        without = block()
        started = time.perf_counter()
        store.save(pair, state_of(step), {})
        held = time.perf_counter() - started
        written: list[float] = []

        def watch(started: float = started + held, written: list[float] = written) -> None:
            store.wait()
            written.append(time.perf_counter() - started)

        watcher = threading.Thread(target=watch)
        watcher.start()
        with_save = block()
        in_time = not watcher.is_alive()
        watcher.join()
        error = store.take_error()
        if error is not None:
            raise error
        if not in_time:
            raise SystemExit(f"the write took {written[0]:.1f} s, longer than a block: use a larger --block-steps")
        pairs.append({"without_s": without, "with_s": with_save, "held_s": held, "write_s": written[0]})
    return summary(pairs, options) | {"checkpoint_bytes": (directory / "last.pt").stat().st_size}


def summary(pairs: list[dict[str, float]], options: argparse.Namespace) -> dict[str, Any]:
    step_s = statistics.median(pair["without_s"] for pair in pairs) / options.block_steps
    held_s = statistics.median(pair["held_s"] for pair in pairs)
    extra_s = statistics.median(pair["with_s"] - pair["without_s"] for pair in pairs)
    return {
        "step_s": round(step_s, 4),
        "held_s": round(held_s, 4),
        "extra_s": round(extra_s, 4),
        "write_s": round(statistics.median(pair["write_s"] for pair in pairs), 3),
        "share": round((held_s + extra_s) / (options.every_steps * step_s), 5),
        "pairs": [{name: round(value, 3) for name, value in pair.items()} for pair in pairs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--backbone", default="vit_s16", help="of conf/backbone, at 224 pixels")
    parser.add_argument("--out-dim", type=int, default=65536, help="prototypes")
    parser.add_argument("--batch", type=int, default=2, help="images a step")
    parser.add_argument("--local-views", type=int, default=2)
    parser.add_argument("--block-steps", type=int, default=5, help="steps a block; a write must end within one")
    parser.add_argument("--pairs", type=int, default=5, help="blocks without and with a save")
    parser.add_argument("--every-steps", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--threads", type=int, help="of torch; default: as torch decides")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="checkpoint_cost_") as directory:
        measured = measure(options, Path(directory))
    given = {
        name: getattr(options, name)
        for name in ("backbone", "out_dim", "batch", "local_views", "block_steps", "every_steps")
    }
    versions = {name: provenance()[name] for name in ("torch", "commit")}
    print(json.dumps(measured | given | {"threads": torch.get_num_threads(), **versions}))


if __name__ == "__main__":
    main()
