"""Reading back what trackers have written, and finding their processes."""

import json
import struct
from pathlib import Path
from typing import Any

import psutil
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768  # bytes, of the log format of LevelDB, in which wandb writes its records
HEADER = 7  # bytes, of the file and of every chunk: checksum, length, kind
FULL, LAST = 1, 4  # kinds of chunks that end a record


def wandb_records(run_dir: Path, kind: str) -> list[Any]:
    """The records of a kind (`run`, `history`, `alert` ...) of all attempts of a run, in order."""
    records = [record for path in sorted(run_dir.glob("wandb/*run-*/*.wandb")) for record in _records(path)]
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def wandb_rows(run_dir: Path) -> list[dict[str, Any]]:
    """What was logged, row by row, as plain values."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.item}
        for record in wandb_records(run_dir, "history")
    ]


def wandb_ids(run_dir: Path) -> list[str]:
    return [run.run_id for run in wandb_records(run_dir, "run")]


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """A row of wandb or a line of `metrics.jsonl`, as far as the two are to be equal."""
    left_out = ("_step", "_runtime", "_timestamp", "_wandb", "time")
    return {name: value for name, value in row.items() if name not in left_out and value is not None}


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of all scalars of TensorBoard, by name."""
    files = tensorboard(run_dir)
    return {tag: [(event.step, event.value) for event in files.Scalars(tag)] for tag in files.Tags()["scalars"]}


def tensorboard(run_dir: Path) -> EventAccumulator:
    files = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    files.Reload()
    return files


def mirrors_of(process: int) -> list[psutil.Process]:
    """The mirrors that a process has started and that still run."""
    try:
        children = psutil.Process(process).children()
        return [c for c in children if c.status() != psutil.STATUS_ZOMBIE and "dino.logger.mirror" in c.cmdline()]
    except psutil.NoSuchProcess:
        return []


def num_sent(run_dir: Path, tracker: str) -> int:
    path = run_dir / "trackers" / f"{tracker}.sent"
    count: int = json.loads(path.read_text())["num_lines"] if path.exists() else 0
    return count


def _records(path: Path) -> list[Record]:
    content, position = path.read_bytes(), HEADER
    records, parts = [], b""
    while position + HEADER <= len(content):
        if BLOCK - position % BLOCK < HEADER:  # what is left of a block is padding
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        if position + HEADER + length > len(content):
            break  # cut short
        parts += content[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (FULL, LAST):
            records.append(Record.FromString(parts))
            parts = b""
    return records
