"""Where the time of a step goes: waiting for data, forward, backward, update."""

import itertools
import time
from collections import Counter
from typing import Literal

import torch

Phase = Literal["data_wait", "forward", "backward", "update"]
MAX_EVENTS = 512  # of a GPU, until the next logged step; the steps after those are not timed


class StepTimer:
    """Sums up the phases of the steps between two logged ones.

    `begin` starts the watch, before the views of a step are asked for and again before the step; `mark` says which
    phase has ended now. On a CPU that reads a clock. On a GPU, where the host runs ahead, it records an event on the
    stream; the events are read by `lap`, after the host has waited for the device anyway. Waiting for data is
    then the time in which the device has no step to do.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._seconds: dict[Phase, float] = {}
        self._events: list[tuple[Phase | None, torch.Event]] = []  # None: the watch was started
        self._has_room = True
        self._last = 0.0

    def begin(self) -> None:
        """A step begins, or waiting for its views."""
        self._has_room = len(self._events) < MAX_EVENTS
        if not self.on_gpu:
            self._last = time.perf_counter()
        elif self._has_room:
            self._record(None)

    def mark(self, phase: Phase) -> None:
        """`phase` is what has been done since the last mark, or since the watch was started."""
        if not self.on_gpu:
            now = time.perf_counter()
            self._add(phase, now - self._last)
            self._last = now
        elif self._has_room:
            self._record(phase)

    def lap(self, steps: int) -> dict[str, float]:
        """`perf/<phase>_s`, the mean over the `steps` steps since the last call [s]; comes when the device is done."""
        events, self._events = self._events, []
        num_ended = Counter(phase for phase, _ in events)
        for (_, start), (phase, end) in itertools.pairwise(events):
            if phase is not None:
                self._add(phase, start.elapsed_time(end) / 1000)
        seconds, self._seconds = self._seconds, {}
        waits, updates = (num_ended["data_wait"], num_ended["update"]) if self.on_gpu else (steps, steps)
        return {f"perf/{phase}_s": s / (waits if phase == "data_wait" else updates) for phase, s in seconds.items()}

    def _record(self, phase: Phase | None) -> None:
        event = torch.Event("cuda", enable_timing=True)
        event.record()
        self._events.append((phase, event))

    def _add(self, phase: Phase, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
