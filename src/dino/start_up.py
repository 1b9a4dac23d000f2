"""How long a process takes until its first step is done, and what for. Imports no torch."""

import time

import psutil

SHOWN_S = 0.05  # what takes less is not worth a word

_is_first = True


class StartUp:
    """Seconds of each phase from the start of the process on; of a later run in the same process, from now on."""

    def __init__(self) -> None:
        global _is_first
        before = max(0.0, time.time() - psutil.Process().create_time()) if _is_first else 0.0
        _is_first = False
        self.phases: dict[str, float] = {}
        self._last = time.perf_counter() - before
        self._told = False

    def mark(self, phase: str) -> None:
        """`phase` is what has been done since the last mark, or since the start."""
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def done(self) -> bool:
        return "first step" in self.phases

    def metrics(self) -> dict[str, float]:
        """`perf/first_step_s`, the time to the end of the first step [s]; once, when that is known."""
        if self._told or not self.done:
            return {}
        self._told = True
        return {"perf/first_step_s": sum(self.phases.values())}

    def __str__(self) -> str:
        parts = (f"{phase} {seconds:.1f}" for phase, seconds in self.phases.items() if seconds >= SHOWN_S)
        return f"done {sum(self.phases.values()):.1f} s after the start ({', '.join(parts)})"
