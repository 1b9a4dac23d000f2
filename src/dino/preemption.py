"""Signals that end or move a run. They are noted when they come, and acted on between two steps. Imports no torch.

A cluster sends SIGTERM, SIGUSR1 or SIGUSR2 ahead of a time limit or a preemption, to the process or to all of its
group; a person sends SIGINT with Ctrl-C. All four mean the same: finish the step, save, and come back later.
"""

import contextlib
import ctypes
import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TypeVar

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

PR_SET_PDEATHSIG = 1  # linux/prctl.h

Item = TypeVar("Item")
Handler = Callable[[int, FrameType | None], object]

_received: list[signal.Signals] = []
_earlier: dict[int, object] = {}  # what handled the signals before `listen`


class Preempted(Exception):  # noqa: N818  not an error
    """A signal asked the run to stop; raised between two steps, on every rank at the same one."""


def listen() -> None:
    """From now on the signals are noted. Handlers that were there before are kept for `hand_on`; a second call is fine.

    Only for the main thread, where Python handles signals.
    """
    for number in SIGNALS:
        current = signal.getsignal(number)
        if current is not _note:
            _earlier[number] = current
            signal.signal(number, _note)


def requested() -> bool:
    """Whether a signal has come to this process."""
    return bool(_received)


def check() -> None:
    """Raises `Preempted` if a signal has come to any rank; every rank must call it."""
    from dino.ranks import any_rank

    if any_rank(requested()):
        raise Preempted(_received[0].name if _received else "a signal to another rank")


def until_requested(items: Iterable[Item]) -> Iterator[Item]:
    """The items, as long as no signal has come to this process; `check` is to follow."""
    for item in items:
        if requested():
            return
        yield item


def hand_on() -> None:
    """Calls what handled the signals before `listen` (a job manager's requeue), now that everything is saved.

    Signals that come later are ignored: the process is on its way out, and its exit code is to say why.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    for number in dict.fromkeys(_received):
        handler = _earlier.get(number)
        if callable(handler) and handler is not signal.default_int_handler:
            handler(number, None)


def follow_parent() -> None:
    """Counts the death of the parent as SIGTERM, since ranks would outlive a torchrun that is killed (on Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _note(number: int, _frame: FrameType | None) -> None:
    if number == signal.SIGINT and signal.SIGINT in _received:
        raise KeyboardInterrupt  # asked twice: stop at once
    _received.append(signal.Signals(number))
