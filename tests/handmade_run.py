"""Run directories made by hand, whose right analysis is known; and pictures as the evaluation leaves them."""

import json
import math
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

LN_K = math.log(256)
STEPS_PER_EPOCH = 10
CONFIG = {
    "fingerprint": "5f6a68f7baa33bd7",
    "name": "digits",
    "dataset": {"name": "digits", "num_workers": 0},
    "loss": {"teacher_temp": 0.04, "warmup_teacher_temp": 0.04, "center_momentum": 0.9, "koleo_weight": 0.0},
    "ema": {"momentum": 0.996},
    "optimizer": {"lr": 0.024},
    "trainer": {"epochs": 100, "clip_norm": 3.0},
}
GROUPS = ("backbone.patch_embed", "backbone.blocks.0", "backbone.blocks.1", "backbone.norm", "head.mlp")

Curve = Callable[[int], float | None]


def healthy(step: int) -> dict[str, float | None]:
    """Metrics of a step of a run that learns; the numbers move like those of real ones, with noise."""
    noise = np.random.default_rng(step).normal
    share = step / 1000
    kl, entropy = 2 * math.exp(-3 * share) + 0.05 * noise(), 0.6 + 0.05 * noise()
    metrics: dict[str, float | None] = {
        "train/loss": kl + entropy,
        "train/loss_global": 0.9 * (kl + entropy),
        "train/loss_local": 1.1 * (kl + entropy),
        "train/loss_uniform": LN_K,
        "train/cross_entropy": kl + entropy,
        "train/kl_teacher_student": kl,
        "train/entropy_teacher": entropy,
        "train/entropy_student": kl + 0.5,
        "train/entropy_batch_mean": 4.5 + 0.05 * noise(),
        "train/confidence_teacher": 0.8,
        "train/confidence_student": 0.5 + 0.2 * share,
        "train/teacher_agreement": 0.5 + 0.4 * share,
        "train/student_teacher_agreement": 0.4 + 0.4 * share,
        "train/num_prototypes_used": 40 + 5 * noise(),
        "train/center_norm": 1 + 2 * share + 0.02 * noise(),
        "train/grad_norm": 2 * math.exp(0.3 * noise()),
        "train/lr": 0.003 * (1 - share),
        "train/teacher_temp": 0.04,
        "perf/step_time_s": 0.03,
        "perf/data_wait_s": 0.002,
        "perf/forward_s": 0.012,
        "perf/backward_s": 0.012,
        "perf/update_s": 0.004,
        "perf/images_per_s": 1000 + 20 * noise(),
        "perf/process_memory_gib": 0.8,
        "perf/peak_memory_gib": 0.85,
    }
    return metrics | {f"grad/{group}/norm": (place + 1) * math.exp(0.3 * noise()) for place, group in enumerate(GROUPS)}


def evaluation(step: int) -> dict[str, float | None]:
    share = 1 - math.exp(-step / 300)
    metrics: dict[str, float | None] = {
        "val/knn_top1": 46.7 + 48 * share,
        "val/loss": 2.0 - share,
        "val/effective_rank": 2.4 + 30 * share,
        "val/effective_rank_ratio": 0.04 + 0.5 * share,
        "val/feature_std": 0.2 + 0.6 * share,
        "val/view_retrieval_top1": 30 + 60 * share,
    }
    return metrics | ({"val/knn_top1_pixels": 97.5} if step == 0 else {})


def run_directory(
    folder: Path,
    *,
    steps: int = 1000,
    every: int = 2,
    state: str = "finished",
    changes: Mapping[str, Curve] | None = None,
    events: Sequence[Mapping[str, Any]] = (),
    config: Mapping[str, Any] | None = None,
    **status: Any,
) -> Path:
    """A run of 1000 steps as far as `steps`, logged every two, evaluated every hundred.

    Args:
        changes: metric -> its value at a step, in place of that of a healthy run; a value of NaN leaves it out.
        events: lines of `metrics.jsonl` with `step`, `event` and `text`.
        config: changes to `CONFIG`, by group.
    """
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = [dict(event) for event in events]
    for step in range(0, steps + 1, every):
        lines += [{"step": step, **_changed(step, healthy(step), changes)}] if step else []
        lines += [{"step": step, **_changed(step, evaluation(step), changes)}] if step % 100 == 0 else []
    stamped = [
        {"step": line["step"], "epoch": line["step"] / STEPS_PER_EPOCH, "time": 1.8e9 + line["step"]} | line
        for line in sorted(lines, key=lambda line: line["step"])
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in stamped))
    known = {"state": state, "step": steps, "reason": None, "exit_code": 0, "total_steps": 1000, "commit": "f47b9a1"}
    (folder / "status.json").write_text(json.dumps({**known, "host": socket.gethostname(), "pid": "1", **status}))
    merged = {
        key: {**value, **(config or {}).get(key, {})} if isinstance(value, dict) else value
        for key, value in CONFIG.items()
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({**merged, "run_dir": str(folder)}))
    return folder


def _changed(
    step: int, metrics: dict[str, float | None], changes: Mapping[str, Curve] | None
) -> dict[str, float | None]:
    changed = {
        name: (changes or {})[name](step) if name in (changes or {}) else value for name, value in metrics.items()
    }
    return {name: value for name, value in changed.items() if value is None or not math.isnan(value)}


def verdict(step: int, kind: str, *, severe: bool, count: int = 1, text: str = "evidence; advice") -> dict[str, Any]:
    return {
        "step": step,
        "event": "verdict",
        "verdict": kind,
        "text": text,
        "severe": severe,
        "count": count,
        "evidence": {},
    }


def over(step: int, kind: str) -> dict[str, Any]:
    return {
        "step": step,
        "event": "verdict_over",
        "verdict": kind,
        "text": "no longer holds",
        "severe": True,
        "count": 1,
    }


def expected_move(step: int) -> dict[str, Any]:
    return {"step": step, "event": "expected_move", "cause": "lr_peak", "text": "the learning rate is at its peak"}


def add_pictures(run_dir: Path, steps: Sequence[int], size: int = 300) -> None:
    """Noise, which does not compress."""
    noise = np.random.default_rng(0)
    pictures = run_dir / "pictures"
    for folder in (pictures, *(pictures / f"step_{step:08}" for step in steps)):
        folder.mkdir()
        for name in ("views.png",) if folder == pictures else ("attention.png", "neighbours.png"):
            Image.fromarray(noise.integers(0, 255, (size, 2 * size, 3), dtype=np.uint8)).save(folder / name)
    for step in steps:
        edges = np.linspace(0, 1, 41)
        counts = noise.multinomial(500, np.full(40, 1 / 40))
        whose = {
            "entropy": {"edges": (edges * LN_K).tolist(), "counts": counts.tolist()},
            "max_probability": {"edges": edges.tolist(), "counts": counts.tolist()},
            "concentration": {"rank": [1, 2, 4, 8], "mass": [0.5, 0.7, 0.9, 1.0]},
        }
        content = {"num_prototypes": 256, "teacher": whose, "student": whose, "agreement": {"teacher": 0.5}}
        (pictures / f"step_{step:08}" / "distributions.json").write_text(json.dumps(content))
