"""What ranks tell each other, over real gloo processes; and that none waits for one that is gone."""

import itertools
import os
import signal
import socket
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from dino import preemption, ranks
from dino.processes import Processes

RunRanks = Callable[..., list[Any]]
StartRanks = Callable[..., list[ForkProcess]]

CPU = torch.device("cpu")
NOTICED_S = 60  # generous: it takes about a second


def ask_everything() -> dict[str, Any]:
    """The answer of every function, for inputs that differ by rank; also without torch.distributed."""
    me = torch.tensor([float(ranks.rank()), -float(ranks.rank())])
    with ranks.alone():
        own = ranks.sum_over_ranks(me + 10).tolist(), ranks.world_size(), ranks.any_rank(False)
    return {
        "ranks": (ranks.rank(), ranks.world_size()),
        "sum": ranks.sum_over_ranks(me.clone()).tolist(),
        "max": ranks.max_over_ranks(me.clone()).tolist(),
        "nobody": ranks.any_rank(False),
        "last": ranks.any_rank(ranks.rank() == ranks.world_size() - 1),
        "objects": ranks.gather_objects({"rank": ranks.rank()}),
        "main": ranks.from_main(f"from {ranks.rank()}"),
        "alone": own,
    }


def test_three_ranks_hear_each_other(run_ranks: RunRanks) -> None:
    for rank, found in enumerate(run_ranks(ask_everything, 3)):
        assert found == {
            "ranks": (rank, 3),
            "sum": [3, -3],
            "max": [2, 0],
            "nobody": False,
            "last": True,
            "objects": [{"rank": 0}, {"rank": 1}, {"rank": 2}],
            "main": "from 0",
            "alone": ([10 + rank, 10 - rank], 1, False),
        }


def test_a_single_process_hears_itself_without_torch_distributed() -> None:
    with ranks.process_group(Processes(), CPU):
        found = ask_everything()
        assert not torch.distributed.is_initialized()
    assert found["objects"] == [{"rank": 0}]
    assert found["sum"] == [0, 0]
    assert (found["nobody"], found["last"]) == (False, True)


@pytest.mark.parametrize("lengths", [(2, 2, 2), (1, 4, 2), (0, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_rows_come_in_the_order_of_the_ranks(run_ranks: RunRanks, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    rows = torch.arange(sum(lengths) * 6).reshape(-1, 2, 3).to(dtype)

    def gather() -> torch.Tensor:
        own = rows.split(lengths)[ranks.rank()]
        return ranks.gather_rows(own if len(own) else torch.empty(0, dtype=dtype))

    for found in run_ranks(gather, 3):
        assert found.dtype == dtype
        assert found.tolist() == rows.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("count", "unit"), [(0, 1), (3, 1), (10, 1), (10, 4), (64, 16), (65, 16), (5, 100)])
def test_parts_are_whole_chunks_that_together_are_everything(
    monkeypatch: pytest.MonkeyPatch, world_size: int, count: int, unit: int
) -> None:
    monkeypatch.setattr(ranks, "world_size", lambda: world_size)
    parts = []
    for rank in range(world_size):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        parts.append(list(range(count))[ranks.own_part(count, unit)])
    assert list(itertools.chain(*parts)) == list(range(count))
    chunks = [-(-len(part) // unit) for part in parts]
    assert sum(chunks) == -(-count // unit)
    assert max(chunks) - min(chunks) <= 1


def test_alone_ends_with_its_block_also_by_an_exception(run_ranks: RunRanks) -> None:
    def leave() -> tuple[int, int]:
        with pytest.raises(RuntimeError, match="on purpose"), ranks.alone(), ranks.alone():
            raise RuntimeError("on purpose")
        return ranks.world_size(), len(ranks.gather_objects(None))

    assert run_ranks(leave, 2) == [(2, 2)] * 2


def test_a_port_in_use_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with (
            pytest.raises(ValueError, match=rf"MASTER_PORT={port} cannot be listened on .*set another one"),
            ranks.process_group(Processes(rank=0, world_size=2), CPU),
        ):
            pass


def test_a_signal_to_one_rank_is_seen_by_all(run_ranks: RunRanks) -> None:
    def stop_at_the_same_step() -> int:
        preemption.listen()
        for step in range(1000):
            if step == 5 and ranks.rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            try:
                preemption.check()
            except preemption.Preempted:
                return step
        return -1

    assert run_ranks(stop_at_the_same_step, 2) == [5, 5]


def die_by_signal() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_by_exception() -> None:
    raise RuntimeError("rank 1 fails on purpose")


@pytest.mark.parametrize("die", [die_by_signal, die_by_exception])
@pytest.mark.parametrize("wait", ["sum_over_ranks", "any_rank", "gather_objects"])
def test_nobody_waits_for_a_rank_that_died(
    start_ranks: StartRanks, tmp_path: Path, capfd: pytest.CaptureFixture[str], die: Callable[[], None], wait: str
) -> None:
    def loop() -> None:
        for step in range(1000):
            if step == 3 and ranks.rank() == 1:
                die()
            try:
                getattr(ranks, wait)(torch.ones(3) if wait == "sum_over_ranks" else True)
            except RuntimeError:
                (tmp_path / "noticed").write_text(f"{step}")
                raise

    processes = start_ranks(loop, 2)
    for process in processes:
        process.join(NOTICED_S)
    waiting = [process for process in processes if process.is_alive()]
    for process in waiting:
        process.kill()
        process.join()
    assert not waiting
    assert (tmp_path / "noticed").read_text() == "3"
    assert [process.exitcode for process in processes] == [1, -signal.SIGKILL if die is die_by_signal else 1]
    if die is die_by_exception:
        assert "rank 1 fails on purpose" in capfd.readouterr().err
