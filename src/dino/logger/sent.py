"""What a tracker was sent of a run: `trackers/<name>.sent`."""

import json
from pathlib import Path
from typing import Any

from dino.run import write_json

FOLDER = "trackers"  # in the run directory: settings, log and what was sent, of each tracker


class Sent:
    """How many lines of `metrics.jsonl`, and which pictures, were handed over to a tracker, for the run of an id there.

    Each is noted before it is handed over, so that nothing is sent twice, whatever happens in between.
    """

    def __init__(self, run_dir: Path, name: str, tracker_id: str | None) -> None:
        self._path = run_dir / FOLDER / f"{name}.sent"
        self._id = tracker_id
        record = read_json(self._path)
        record = record if record.get("id") == tracker_id else {}
        self.num_lines: int = record.get("num_lines", 0)
        self.pictures: list[str] = record.get("pictures", [])

    def note_lines(self, number: int) -> None:
        self.num_lines = number
        self._write()

    def note_picture(self, place: str) -> None:
        self.pictures.append(place)
        self._write()

    def _write(self) -> None:
        write_json(self._path, {"id": self._id, "num_lines": self.num_lines, "pictures": self.pictures})


def read_json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file, or no whole one."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def num_lines_of(path: Path) -> int:
    """The number of whole lines in a file; 0 where it cannot be read."""
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0
