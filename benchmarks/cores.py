"""How far apart two cores are: how long a word from one to the other and an answer take.

On a virtual machine that changes while a benchmark runs, as the host moves its cores: where they share a cache, what
one wrote is near the other; on two chips it is far, but they read and write memory faster. Either decides what is
quicker, so `summary.py` also takes ratios of each by itself.

Run as a program, this file is the core that answers.
"""

import mmap
import os
import subprocess
import sys
import time

WORDS, AT_A_TIME = 4000, 200
READY, WORD, ANSWER = 1, 2, 3


def round_trip_ns() -> float:
    """Between the first and the last core of this process, Python's loops included [ns]; 0 where that is the same."""
    own = os.sched_getaffinity(0)
    if len(own) == 1:
        return 0.0
    shared = os.memfd_create("cores")
    os.ftruncate(shared, mmap.PAGESIZE)
    with (
        mmap.mmap(shared, mmap.PAGESIZE) as page,
        subprocess.Popen([sys.executable, "-IS", __file__, str(shared), str(max(own))], pass_fds=[shared]) as other,
    ):
        os.close(shared)
        try:
            while page[0] != READY:
                if other.poll() is not None:
                    raise RuntimeError(f"the other core ended with code {other.returncode}")
            os.sched_setaffinity(0, {min(own)})
            return round(min(_seconds(page) for _ in range(WORDS // AT_A_TIME)) / AT_A_TIME * 1e9, 1)
        finally:
            os.sched_setaffinity(0, own)
            other.kill()


def _seconds(page: mmap.mmap) -> float:
    started = time.perf_counter()
    for _ in range(AT_A_TIME):
        page[0] = WORD
        while page[0] != ANSWER:
            pass
    return time.perf_counter() - started


def _answer(page: mmap.mmap) -> None:
    page[0] = READY
    for _ in range(WORDS):
        while page[0] != WORD:
            pass
        page[0] = ANSWER


if __name__ == "__main__":
    os.sched_setaffinity(0, {int(sys.argv[2])})
    _answer(mmap.mmap(int(sys.argv[1]), mmap.PAGESIZE))
