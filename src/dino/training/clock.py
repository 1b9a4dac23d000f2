"""Time spent training, with evaluation and saving left out."""

import contextlib
import time
from collections.abc import Iterator


class TrainingClock:
    """Counts seconds from `start`; stands still inside `paused`."""

    def __init__(self) -> None:
        self._before = 0.0  # seconds counted up to the last start
        self._since: float | None = None
        self._last_lap = 0.0

    @property
    def seconds(self) -> float:
        return self._before + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def start(self) -> None:
        self._since = time.perf_counter()

    def resume_from(self, seconds: float) -> None:
        """Counts on from what an earlier process had counted; comes before `start`."""
        self._before = self._last_lap = seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._before, self._since = self.seconds, None
        try:
            yield
        finally:
            self.start()

    def lap(self) -> float:
        """Seconds since the last call (since the start at the first)."""
        now = self.seconds
        lap, self._last_lap = now - self._last_lap, now
        return lap
