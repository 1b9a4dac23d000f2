"""What a run says of the machine that it stands on."""

import subprocess
import sys

import torch

from dino.runtime import peak_memory_gib


def test_the_peak_of_memory_is_the_runs_own_and_not_that_of_who_started_it() -> None:
    torch.ones(2**28)  # 1 GiB, given back at once; a process that is started now is told of it by the system
    assert peak_memory_gib(torch.device("cpu")) > 1
    program = "import torch; from dino.runtime import peak_memory_gib; print(peak_memory_gib(torch.device('cpu')))"
    started = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.1 < float(started.stdout) < 1
