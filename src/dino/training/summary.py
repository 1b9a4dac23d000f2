"""What a finished run has to say: `training_summary.json`, and the last lines in the terminal."""

import contextlib
import logging
import shlex
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dino.exits import EXIT_COLLAPSED, EXIT_NON_FINITE
from dino.logger.json_lines import read_lines
from dino.messages import as_override
from dino.monitor import began_with_weights, higher_is_better
from dino.run import write_json
from dino.training.trainer import Trainer

log = logging.getLogger("dino")

NOT_METRICS = {"step", "epoch", "time"}


def summarise_run(trainer: Trainer) -> None:
    """Writes `training_summary.json` and prints metrics, places and what to do next."""
    run_dir, best = trainer.run.directory, trainer.early_stopping
    if not trainer.run.processes.is_main:
        return
    lines = read_lines(run_dir / "metrics.jsonl")
    path = run_dir / "training_summary.json"
    if not lines and path.exists():
        log.warning("kept        %s, as metrics.jsonl is empty", path)
        return
    summary = {
        "steps": trainer.step,
        "epochs": trainer.step / trainer.steps_per_epoch,
        "images": trainer.step * trainer.images_per_step,
        "train_time_s": round(trainer.clock.seconds, 3),
        "num_skipped_steps": trainer.non_finite.num_skipped,
        "best_checkpoint": {"metric": best.metric, "value": best.best, "step": best.best_step},
        "ended_early": best.reason if best.exhausted else None,
        "verdicts": dict(trainer.health.counts),
        "metrics": summarise(lines),
    }
    write_json(path, summary)
    for line in closing_words(trainer, summary, lines):
        log.info(line)


@contextlib.contextmanager
def leaving_report(run_dir: Path, *, wanted: bool) -> Iterator[None]:
    """Leaves a `report.html` when what is inside has come to an end of its own: finished, not finite, or collapsed."""
    try:
        yield
    except SystemExit as stop:
        if wanted and stop.code in (EXIT_NON_FINITE, EXIT_COLLAPSED):
            _leave_report(run_dir)
        raise
    if wanted:
        _leave_report(run_dir)


def _leave_report(run_dir: Path) -> None:
    """Writes it and says where it is; a failure is said, and is no more. One without a line would say nothing, and
    takes the place of none."""
    from dino.analysis import write_report  # here, since drawing needs packages that training does not

    try:
        if (run_dir / "report.html").exists() and not read_lines(run_dir / "metrics.jsonl"):
            return
        print(f"report      {write_report([run_dir])}", flush=True)
    except Exception:  # whatever it is, the run itself is complete
        with contextlib.suppress(OSError), (run_dir / "train.log").open("a") as file:
            file.write(traceback.format_exc())
        print(f"the report could not be written (traceback in {run_dir / 'train.log'}): try dino report {run_dir}")


def summarise(lines: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Final, mean, min and max of each metric, and `best` with its step where a metric has a better direction."""
    lines = [line for line in lines if "event" not in line]
    names = sorted({name for line in lines for name in line} - NOT_METRICS)
    return {name: row for name in names if (row := _summary_of(name, lines))}


def _summary_of(name: str, lines: list[dict[str, float]]) -> dict[str, float]:
    points = [(line[name], line["step"]) for line in lines if line.get(name) is not None]
    if not points:
        return {}
    values = [value for value, _ in points]
    summary = {"final": values[-1], "mean": sum(values) / len(values), "min": min(values), "max": max(values)}
    better = higher_is_better(name)
    if better is not None:
        trained = [point for point in points if point[1] > 0] or points  # step 0 is the untrained network
        best, step = (max if better else min)(trained, key=lambda point: point[0])  # the first of equal ones
        summary |= {"best": best, "best_step": step}
    return summary


def closing_words(trainer: Trainer, summary: dict[str, Any], lines: list[dict[str, float]]) -> list[str]:
    """The metrics, where everything lies, and the commands for what next."""
    run_dir, metrics = trainer.run.directory, summary["metrics"]
    minutes, seconds = divmod(round(summary["train_time_s"]), 60)
    words = [f"trained     {summary['steps']} steps on {summary['images']:,} images in {minutes} min {seconds} s"]
    if "train/loss" in metrics:
        words.append(f"loss        {metrics['train/loss']['final']:.3f}")
    speed = metrics.get("perf/images_per_s")
    if speed is not None:
        memory = metrics["perf/peak_memory_gib"]["max"]
        words.append(f"speed       {speed['mean']:.1f} images/s, peak memory {memory:.2f} GiB")
    start = "the loaded weights" if began_with_weights(trainer.settings) else "the untrained network"
    before = next((line["val/knn_top1"] for line in lines if line["step"] == 0 and "val/knn_top1" in line), None)
    is_worse = before is not None and metrics["val/knn_top1"]["final"] < before
    if "val/knn_top1" in metrics:
        words.append(f"k-NN        {_knn_words(metrics, start, before)}")
    words.append(f"health      {_health_words(trainer)}{f'; k-NN is below that of {start}' if is_worse else ''}")
    names = [f"checkpoints/{name}.pt" for name in ("best", "last") if (run_dir / f"checkpoints/{name}.pt").exists()]
    splits = trainer.dataset.evaluation()
    has_labels = splits is not None and all(source.labels is not None for source in splits)
    protocols = "knn,linear" if has_labels else "rank"
    words += [
        f"files       {', '.join([f'{run_dir}: metrics.jsonl', 'training_summary.json', *names])}",
        f"evaluate    dino evaluate {shlex.quote(str(run_dir))} --protocol {protocols}",
    ]
    if not trainer.early_stopping.exhausted:  # it would stop again
        whole = trainer.options.epochs * trainer.steps_per_epoch == trainer.total_steps
        more = "trainer.epochs=MORE 'resume_changes=[trainer.epochs]'" if whole else "trainer.max_steps=MORE"
        command = f"python train.py <same overrides> {as_override('run_dir', run_dir)} resume=auto"
        words.append(f"longer      {command} {more}")
    return words


def _health_words(trainer: Trainer) -> str:
    if trainer.monitor.on_collapse == "off":
        return "not watched (monitor.on_collapse=off)"
    counts = trainer.health.counts
    if not counts:
        return "no collapse or divergence found"
    return "found " + ", ".join(f"{kind} (at {count} looks)" for kind, count in counts.items())


def _knn_words(metrics: dict[str, dict[str, float]], start: str, before: float | None) -> str:
    """The trained accuracy with what it has to beat beside it: that of the `start`, and raw pixels."""
    knn = metrics["val/knn_top1"]
    words = f"{knn['final']:.1f} % of held-out images (best {knn['best']:.1f} %)"
    if before is not None:
        words += f"; {start} {before:.1f} %"
    if "val/knn_top1_pixels" in metrics:
        words += f"; raw pixels {metrics['val/knn_top1_pixels']['final']:.1f} %"
    return words
