"""`metrics.jsonl`: one JSON object a logged step or event; the truth that everything else is drawn from."""

import io
import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from dino.logger.base import Logger, RunContext

log = logging.getLogger("dino")


class JSONLinesLogger(Logger):
    """Appends one line a logged step: `step`, `epoch`, `time` (Unix time [s]) and the metrics by name.

    An event is a line with `event` (its name), `text` and its details in place of metrics. Non-finite values become
    `null`, since JSON has no NaN. A checkpoint knows how many lines there were; a run resumed from it first drops those
    after them, which it is about to write again, so that no step is doubled or missing.
    """

    def __init__(self) -> None:
        self._file: io.FileIO | None = None
        self._num_lines: int | None = None
        self._steps_per_epoch = 1
        self._unwritten = b""  # lines for which the disk had no room yet

    def start(self, context: RunContext) -> None:
        path = context.run_dir / "metrics.jsonl"
        known = self._num_lines
        if known is None:  # not resumed, or from a run without this logger
            lines = read_lines(path) if context.first_step > 0 and path.exists() else []
            known = sum(line["step"] <= context.first_step for line in lines)
        self._num_lines = keep_first_lines(path, known)
        resumed_here = path.exists() or any((context.run_dir / "checkpoints").glob("step_*.pt"))
        if self._num_lines < known and resumed_here:
            log.warning("metrics.jsonl has lost lines: %d of %d are left", self._num_lines, known)
        self._steps_per_epoch = context.steps_per_epoch
        self._file = path.open("ab", buffering=0)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._write(step, metrics)

    def event(self, step: int, name: str, text: str, **details: Any) -> None:
        self._write(step, {"event": name, "text": text, **details})

    def flush(self) -> None:
        if self._file is not None:
            self._write_out()
            os.fsync(self._file.fileno())

    def state_dict(self) -> dict[str, Any]:
        return {"num_lines": self._num_lines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_lines = state["num_lines"]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, step: int, values: dict[str, Any]) -> None:
        assert self._file is not None, "start() comes first"
        assert self._num_lines is not None
        line = {"step": step, "epoch": step / self._steps_per_epoch, "time": time.time(), **finite(values)}
        waiting = bool(self._unwritten)
        self._unwritten += json.dumps(line).encode() + b"\n"
        self._num_lines += 1
        try:
            self._write_out()
        except OSError as error:
            if not waiting:
                log.warning("metrics.jsonl cannot be written, its lines are kept until it can: %s", error)

    def _write_out(self) -> None:
        """Writes all lines that wait, whole or not at all."""
        assert self._file is not None
        end = os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            while written < len(self._unwritten):
                written += self._file.write(self._unwritten[written:])
        except OSError:
            self._file.truncate(end)
            raise
        self._unwritten = b""


def finite(value: Any) -> Any:
    """The same nested value with None in place of every number that is not finite."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; one that was cut short by a crash, or damaged, is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def keep_first_lines(path: Path, count: int) -> int:
    """Cuts the file behind its first `count` whole lines; returns how many it has then."""
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        kept = 0
        end = 0
        for line in file:
            if kept == count or not line.endswith(b"\n"):
                break
            kept, end = kept + 1, end + len(line)
        file.truncate(end)
    return kept
