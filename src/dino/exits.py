"""The exit codes of a run, which the README lists, and how a command ends."""

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator

EXIT_FAILED = 1
EXIT_BAD_CONFIGURATION = 2
EXIT_NON_FINITE = 3
EXIT_COLLAPSED = 4
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: try again
EXIT_INTERRUPTED = 130


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """What is inside is all that the process does: it ends as ever, but libraries are not taken apart, which takes
    torch's a second. Handlers at exit that are registered inside, such as those of trackers and workers, are called.
    """
    codes: list[int] = []
    atexit.register(_leave, codes)  # the first to be registered is the last to be called
    try:
        yield
        codes.append(0)
    except SystemExit as stop:
        if isinstance(stop.code, int | None):  # Python itself prints any other
            codes.append(stop.code or 0)
        raise


@contextlib.contextmanager
def saying_interrupted() -> Iterator[None]:
    """Commands that Ctrl-C ends say so, also where typer has made an exit code of it."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != EXIT_INTERRUPTED:
            raise
        print("interrupted", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None


def _leave(codes: list[int]) -> None:
    if not codes:
        return
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return  # which Python tells, with an exit code of its own
    os._exit(codes[0])
