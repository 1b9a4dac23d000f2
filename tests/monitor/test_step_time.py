"""Where the time of a step goes."""

import time

import pytest
import torch

from dino.monitor import StepTimer


def test_phases_are_the_means_of_the_steps_since_the_last_lap() -> None:
    timer = StepTimer(torch.device("cpu"))
    for _ in range(4):
        timer.waited(0.5)
        timer.begin()
        time.sleep(0.002)
        timer.mark("forward")
        timer.mark("backward")
        timer.mark("update")
    lap = timer.lap(4)
    assert lap.keys() == {f"perf/{phase}_s" for phase in ("data_wait", "forward", "backward", "update")}
    assert lap["perf/data_wait_s"] == 0.5
    assert lap["perf/forward_s"] >= 0.002
    assert lap["perf/backward_s"] < lap["perf/forward_s"]
    assert timer.lap(1) == {}


def test_several_micro_batches_add_up() -> None:
    timer = StepTimer(torch.device("cpu"))
    timer.begin()
    for _ in range(3):
        time.sleep(0.002)
        timer.mark("forward")
    assert timer.lap(1)["perf/forward_s"] >= 0.006


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_not_waited_for_before_the_lap() -> None:
    timer = StepTimer(torch.device("cuda"))
    rows = torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        timer.begin()
        for _ in range(20):
            rows = rows @ rows
        timer.mark("forward")
        timer.mark("update")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    lap = timer.lap(1)
    assert lap["perf/forward_s"] > lap["perf/update_s"] >= 0
