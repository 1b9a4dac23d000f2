"""Where the time of a step goes."""

import time

import pytest
import torch

from dino.monitor import StepTimer


def test_phases_are_the_means_of_the_steps_since_the_last_lap() -> None:
    timer = StepTimer(torch.device("cpu"))
    for _ in range(4):
        timer.begin()
        time.sleep(0.004)
        timer.mark("data_wait")
        timer.begin()
        time.sleep(0.002)
        timer.mark("forward")
        timer.mark("backward")
        timer.mark("update")
    lap = timer.lap(4)
    assert lap.keys() == {f"perf/{phase}_s" for phase in ("data_wait", "forward", "backward", "update")}
    assert lap["perf/data_wait_s"] >= 0.004
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


class Stream:
    """In place of that of a GPU, in milliseconds: it is done with what it was given at `busy_until`."""

    def __init__(self) -> None:
        self.host = self.busy_until = 0.0

    def run(self, milliseconds: float) -> None:
        self.busy_until = max(self.host, self.busy_until) + milliseconds

    def event(self, *_: object, **__: object) -> "Event":
        return Event(self)


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def record(self) -> None:
        self.at = max(self.stream.host, self.stream.busy_until)

    def elapsed_time(self, later: "Event") -> float:
        return later.at - self.at


@pytest.mark.parametrize(("host_ms", "wait_ms"), [(30.0, 0.0), (150.0, 50.0)])
@pytest.mark.parametrize("num_steps", [10, 300])
def test_a_gpu_waits_for_views_only_once_the_step_before_is_done(
    host_ms: float, wait_ms: float, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Views that the host makes during a step of 100 ms."""
    stream = Stream()
    monkeypatch.setattr(torch, "Event", stream.event)
    timer = StepTimer(torch.device("cuda"))
    stream.run(100)  # the step before
    for _ in range(num_steps):
        timer.begin()
        stream.host += host_ms
        timer.mark("data_wait")
        timer.begin()
        stream.run(40)
        timer.mark("forward")
        stream.run(60)
        timer.mark("update")
    lap = timer.lap(num_steps)
    assert lap == pytest.approx(
        {"perf/data_wait_s": wait_ms / 1000, "perf/forward_s": 0.04, "perf/update_s": 0.06}, abs=1e-9
    )
    assert timer.lap(1) == {}


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
