"""Where the time of a step goes: waiting for data, forward, backward, update."""

import itertools
import time
from typing import Literal

import torch

Phase = Literal["data_wait", "forward", "backward", "update"]
MAX_EVENTS = 512  # of a GPU, until the next logged step; the steps after those are not timed


class StepTimer:
    """Sums up the phases of the steps between two logged ones.

    `begin` starts the watch, `mark` says which phase has ended now. On a CPU that reads a clock. On a GPU, where the
    host runs ahead, it records an event on the stream; the events are read by `lap`, after the host has waited for the
    device anyway. Data are waited for by the host: that phase is always timed by its clock (`waited`).
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._seconds: dict[Phase, float] = {}
        self._events: list[tuple[Phase | None, torch.Event]] = []  # None: a step begins
        self._last = 0.0

    def begin(self) -> None:
        """A step begins."""
        if not self.on_gpu:
            self._last = time.perf_counter()
        elif len(self._events) < MAX_EVENTS:
            self._record(None)

    def mark(self, phase: Phase) -> None:
        """`phase` is what has been done since the last mark, or since the step began."""
        if not self.on_gpu:
            now = time.perf_counter()
            self._add(phase, now - self._last)
            self._last = now
        elif len(self._events) < MAX_EVENTS:
            self._record(phase)

    def waited(self, seconds: float) -> None:
        """Adds time spent waiting for the views of a step."""
        self._add("data_wait", seconds)

    def lap(self, steps: int) -> dict[str, float]:
        """`perf/<phase>_s`, the mean over the `steps` steps since the last call [s]; comes when the device is done."""
        events, self._events = self._events, []
        num_timed = sum(phase is None for phase, _ in events) if self.on_gpu else steps
        for (_, start), (phase, end) in itertools.pairwise(events):
            if phase is not None:
                self._add(phase, start.elapsed_time(end) / 1000)
        seconds, self._seconds = self._seconds, {}
        return {f"perf/{phase}_s": s / (steps if phase == "data_wait" else num_timed) for phase, s in seconds.items()}

    def _record(self, phase: Phase | None) -> None:
        event = torch.Event("cuda", enable_timing=True)
        event.record()
        self._events.append((phase, event))

    def _add(self, phase: Phase, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
