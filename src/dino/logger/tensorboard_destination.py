"""TensorBoard's event files, in the process of the mirror; written without TensorFlow and without torch."""

import struct
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto


class TensorBoardDestination:
    """Scalars (single precision, as TensorBoard keeps them), texts and images at the step of their line."""

    def __init__(self, folder: Path) -> None:
        self._writer = EventFileWriter(str(folder))

    def metrics(self, line: dict[str, Any]) -> None:
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in line.items()
            if name not in ("step", "epoch", "time")
        ]
        self._add(line["step"], line["time"], values)

    def event(self, line: dict[str, Any]) -> None:
        kind = line.get("verdict")
        text = f"**{kind}**: {line['text']}" if kind else line["text"]
        values = [
            Summary.Value(
                tag=f"events/{line['event']}",
                metadata=create_summary_metadata(display_name="", description=""),
                tensor=make_tensor_proto([text.encode()]),
            )
        ]
        if kind:
            values.append(Summary.Value(tag=f"health/{kind}", simple_value=line["count"]))
        self._add(line["step"], line["time"], values)

    def picture(self, step: int, name: str, path: Path) -> None:
        content = path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])  # of a PNG
        image = Summary.Image(height=height, width=width, encoded_image_string=content)
        self._add(step, time.time(), [Summary.Value(tag=f"pictures/{name}", image=image)])

    def report(self, step: int, path: Path) -> None:
        """Nothing: TensorBoard has no place for a page."""

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, wall_time: float, values: list[Any]) -> None:
        self._writer.add_event(Event(step=step, wall_time=wall_time, summary=Summary(value=values)))
