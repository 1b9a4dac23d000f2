"""Who holds a lock file. Asking takes nothing, and no recycled process id can be mistaken for the holder."""

import fcntl
import struct
from pathlib import Path

FLOCK = "hhqqi4x"  # struct flock of Linux: type, whence, start, length, process


def holder_of(path: Path) -> int | None:
    """The process that holds a lock file (`dino.sweep.manifest.lock`); None if no other process does.

    Raises:
        OSError: it cannot be asked.
    """
    question = struct.pack(FLOCK, fcntl.F_WRLCK, 0, 0, 0, 0)
    try:
        with path.open("r") as file:
            answer = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, question))
    except FileNotFoundError:
        return None
    return None if answer[0] == fcntl.F_UNLCK else answer[4]
