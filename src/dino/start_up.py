"""How long a process takes until its first step is done, what for, and beside what. Imports no torch."""

import contextlib
import time

import psutil

SHOWN_S = 0.05  # what takes less is not worth a word
ROUGHLY = 0.5  # of a core: what others take now and then

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
        self._beside = OtherProcesses()

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

    def notice(self, num_threads: int) -> str | None:
        """Says so where other processes have left fewer cores than this one has threads.

        Threads wait for each other in every operation, so one that has lost its core holds up all.
        """
        busy, num_cores = self._beside.busy_cores(), self._beside.num_cores
        left = num_cores - busy + ROUGHLY
        if num_threads == 1 or num_threads < left or busy < ROUGHLY:
            return None
        fewer = max(1, min(num_threads - 1, int(left)))
        return (
            f"other processes keep {busy:.1f} of {num_cores} cores busy, and {num_threads} threads wait for each other "
            f"all the time: trainer.num_threads={fewer} may be faster"
        )

    def __str__(self) -> str:
        parts = (f"{phase} {seconds:.1f}" for phase, seconds in self.phases.items() if seconds >= SHOWN_S)
        return f"done {sum(self.phases.values()):.1f} s after the start ({', '.join(parts)})"


class OtherProcesses:
    """What all but this process and its children take, from now on, of the cores that this one may use."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        can_be_bound = hasattr(self._process, "cpu_affinity")  # not on macOS
        self._cores = self._process.cpu_affinity() if can_be_bound else range(psutil.cpu_count())
        self._since, self._seconds_before = time.perf_counter(), self._seconds()

    @property
    def num_cores(self) -> int:
        return len(self._cores)

    def busy_cores(self) -> float:
        """How many cores they kept busy, on average."""
        return max(0.0, (self._seconds() - self._seconds_before) / (time.perf_counter() - self._since))

    def _seconds(self) -> float:
        of_cores = psutil.cpu_times(percpu=True)
        seconds = sum(of_cores[core].user + of_cores[core].nice + of_cores[core].system for core in self._cores)
        own = self._process.cpu_times()
        seconds -= own.user + own.system + own.children_user + own.children_system
        for child in self._process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                of_child = child.cpu_times()
                seconds -= of_child.user + of_child.system + of_child.children_user + of_child.children_system
        return float(seconds)
