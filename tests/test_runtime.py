"""What a run says of the machine that it stands on."""

import contextlib
import gc
import subprocess
import sys
import weakref

import torch

from dino.runtime import peak_memory_gib, what_lives_stays


def test_the_peak_of_memory_is_the_runs_own_and_not_that_of_who_started_it() -> None:
    torch.ones(2**28)  # 1 GiB, given back at once; a process that is started now is told of it by the system
    assert peak_memory_gib(torch.device("cpu")) > 1
    program = "import torch; from dino.runtime import peak_memory_gib; print(peak_memory_gib(torch.device('cpu')))"
    started = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.1 < float(started.stdout) < 1


def test_what_lives_during_a_run_is_searched_for_garbage_again_after_it() -> None:
    class Node:
        """Refers to itself, so only a search finds it when nobody else does."""

        def __init__(self) -> None:
            self.itself = self

    before = Node()
    of_before = weakref.ref(before)
    with contextlib.suppress(KeyError), what_lives_stays():
        of_inside = weakref.ref(Node())
        del before
        gc.collect()
        assert of_inside() is None, "what is made inside is searched"
        assert of_before() is not None, "what was there is not"
        raise KeyError
    gc.collect()
    assert of_before() is None
