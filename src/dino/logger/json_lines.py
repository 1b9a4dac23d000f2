"""`metrics.jsonl`: one JSON object a logged step; the truth that everything else is drawn from."""

import json
import math
import time
from pathlib import Path
from typing import TextIO

from dino.logger.base import RunContext


class JSONLinesLogger:
    """Appends one line a logged step: `step`, `epoch`, `time` (Unix time [s]) and the metrics by name.

    A resumed run first drops the lines of steps after its checkpoint, which it is about to write again.
    Non-finite values become `null`, since JSON has no NaN.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._steps_per_epoch = 1

    def start(self, context: RunContext) -> None:
        path = context.run_dir / "metrics.jsonl"
        drop_lines_after(path, context.first_step if context.first_step > 0 else -1)
        self._steps_per_epoch = context.steps_per_epoch
        self._file = path.open("a")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        assert self._file is not None, "start() comes first"
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = {"step": step, "epoch": step / self._steps_per_epoch, "time": time.time(), **finite}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def advance(self, step: int) -> None:
        """Unlogged steps leave no line."""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_lines(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`; a last line cut short by a crash is left out."""
    lines: list[dict[str, float]] = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def drop_lines_after(path: Path, step: int) -> None:
    """Rewrites the file without the lines of later steps (and without a torn last line)."""
    if not path.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)
