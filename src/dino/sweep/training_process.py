"""A training process as its supervisor sees it: started, told of every signal, and watched to its end."""

import contextlib
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from dino.exits import EXIT_PREEMPTED
from dino.preemption import SIGNALS, follow_parent

LOOK_EVERY_S = 0.1
EXIT_KILLED = 128 + signal.SIGKILL  # what a shell makes of SIGKILL, and a job manager of a lack of memory
CGROUPS = Path("/sys/fs/cgroup")


class Signals:
    """All signals that have asked this process to stop. They are noted from the first moment, and end nothing."""

    def __init__(self) -> None:
        self.received: list[tuple[signal.Signals, float]] = []  # with the time of each
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received.append((signal.Signals(number), time.time()))


@dataclass(frozen=True)
class Ended:
    """How a training process ended.

    Attributes:
        exit_code: None if a signal ended it.
        signal: such as `SIGKILL`; None if it ended by itself.
        preempted: it stopped because it was asked to, and can go on later.
        out_of_memory: the system ended it for want of memory.
        too_slow: it did not stop in the time that there was, and was killed.
    """

    exit_code: int | None
    signal: str | None = None
    preempted: bool = False
    out_of_memory: bool = False
    too_slow: bool = False

    @property
    def code(self) -> int:
        """As a shell puts it: 128 and the number of the signal."""
        return 128 + signal.Signals[self.signal] if self.signal else self.exit_code or 0


def train(
    words: Sequence[str],
    *,
    environment: Mapping[str, str],
    cwd: Path,
    signals: Signals,
    when_signalled: Callable[[], float | None],
) -> Ended:
    """Runs a training process to its end.

    SIGINT is passed on as SIGTERM: a terminal gives it to the child as well, to which two of them mean `at once`.

    Args:
        when_signalled: called once, after the first signal; says when the process has to have ended [seconds since the
            epoch], None if that is not known.
    """
    if signals.received:
        when_signalled()
        return Ended(EXIT_PREEMPTED, preempted=True)
    killed_before = num_killed_for_memory()
    # It ends when its supervisor is killed, and never runs on alone.
    process = subprocess.Popen(
        words, env=dict(environment), cwd=cwd, stdin=subprocess.DEVNULL, preexec_fn=follow_parent
    )
    passed_on, deadline, too_slow = 0, None, False
    while process.poll() is None:
        for number, _ in signals.received[passed_on:]:
            process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)
            passed_on += 1
            if passed_on == 1:
                deadline = when_signalled()
        if deadline is not None and time.time() > deadline and not too_slow:
            too_slow = True
            process.kill()
        time.sleep(LOOK_EVERY_S)
    code = process.returncode
    died_of_it = bool(signals.received) and -code in SIGNALS  # before it listened
    # Others may share the control group: only a process that was killed can have been the one.
    starved = code == -signal.SIGKILL and num_killed_for_memory() > killed_before
    return Ended(
        exit_code=code if code >= 0 else None,
        signal=signal.Signals(-code).name if code < 0 else None,
        preempted=code == EXIT_PREEMPTED or died_of_it or too_slow,
        out_of_memory=not too_slow and (code == EXIT_KILLED or starved),
        too_slow=too_slow,
    )


def num_killed_for_memory(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """How many processes of this control group the system has killed for want of memory; 0 where it does not say."""
    names = {}
    with contextlib.suppress(OSError):
        names = {kinds: name for _, kinds, name in (line.split(":", 2) for line in own.read_text().splitlines())}
    files = [cgroups / name.lstrip("/") / "memory.events" for kinds, name in names.items() if not kinds]
    files += [
        cgroups / "memory" / name.lstrip("/") / "memory.oom_control"
        for kinds, name in names.items()
        if "memory" in kinds.split(",")
    ]
    # In a container the name may be that of the host, and its own group is the top.
    files += [cgroups / "memory.events", cgroups / "memory" / "memory.oom_control"]
    for file in files:
        with contextlib.suppress(OSError):
            found = re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)
            if found:
                return int(found[1])
    return 0
