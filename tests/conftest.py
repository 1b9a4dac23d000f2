"""Fixtures shared by all tests: figures of the original implementation, and real images where they lie."""

import json
import logging
import multiprocessing
import os
import pickle
import socket
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Read when torch is imported, here and in the commands that tests start: where the threads of several processes wait
# for one another on a busy machine, tiny networks take many times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

RANKS_TIMEOUT_S = 120
SLURM = "tests/slurm/"

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers (pytest -n) a file is one worker's, and all that needs the one Slurm of this machine too."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return SLURM if path.startswith(SLURM) else path

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first."""
    items.sort(key=lambda item: not item.nodeid.startswith(SLURM))


@pytest.fixture(autouse=True)
def log_of_every_test() -> None:
    """A run in a test's own process says how loud the log is, which the next test may not take over."""
    log = logging.getLogger("dino")
    log.setLevel(logging.NOTSET)
    log.propagate = True


@pytest.fixture(scope="session")
def reference() -> Callable[[str], dict[str, Any]]:
    """`reference("loss_0.npz")`: the named file of `tests/reference/official_dino`, as a dictionary."""

    def load(name: str) -> dict[str, Any]:
        path = REPOSITORY / "tests" / "reference" / "official_dino" / name
        if path.suffix == ".json":
            return dict(json.loads(path.read_text()))
        with np.load(path) as arrays:
            return {key: arrays[key] for key in arrays.files}

    return load


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """`shared_data("fashion_mnist")`: a folder of real images, or a skip where there is none."""

    def find(name: str) -> Path:
        root = Path(os.environ.get("DINO_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
        if not (root / name).is_dir():
            pytest.skip(f"no real images at {root / name}: set DINO_TEST_DATA to the folder that holds {name}")
        return root / name

    return find


@pytest.fixture
def start_ranks() -> Callable[..., list[ForkProcess]]:
    """`start_ranks(function, 2, *args)`: `function(*args)` begins on each of 2 gloo ranks of a run of their own.

    Forked, to save importing torch again, so any function will do; the ranks compute on one thread each. On a machine
    with a GPU no test before it in the same process may have run a backward pass: torch refuses one after the fork.
    """

    def start(function: Callable[..., object], world_size: int, *args: object) -> list[ForkProcess]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("fork")
        arguments = [(rank, world_size, port, function, args) for rank in range(world_size)]
        processes = [context.Process(target=_be_rank, args=each) for each in arguments]
        for process in processes:
            process.start()
        return processes

    return start


def _be_rank(rank: int, world_size: int, port: int, function: Callable[..., object], args: tuple[object, ...]) -> None:
    import torch

    from dino.processes import Processes
    from dino.ranks import process_group

    torch.set_num_threads(1)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    os.environ |= dict(zip(names, map(str, (rank, world_size, rank, port)), strict=True)) | {"MASTER_ADDR": "127.0.0.1"}
    with process_group(Processes.from_environment(), torch.device("cpu")):
        function(*args)


@pytest.fixture
def run_ranks(start_ranks: Callable[..., list[ForkProcess]], tmp_path: Path) -> Callable[..., list[Any]]:
    """`run_ranks(function, 2, *args)`: what `function(*args)` returns on each of 2 gloo ranks.

    A rank that fails, or that is not done after two minutes, fails the test; its traceback is in the captured stderr.
    """

    def run(function: Callable[..., Any], world_size: int, *args: object) -> list[Any]:
        def keep_result() -> None:
            result = function(*args)
            (tmp_path / f"result_{os.environ['RANK']}.pickle").write_bytes(pickle.dumps(result))

        processes = start_ranks(keep_result, world_size)
        deadline = time.monotonic() + RANKS_TIMEOUT_S
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process for process in processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        assert not late, f"{len(late)} of {world_size} ranks were not done after {RANKS_TIMEOUT_S} s"
        codes = [process.exitcode for process in processes]
        assert codes == [0] * world_size, f"ranks ended with the exit codes {codes}"
        return [pickle.loads((tmp_path / f"result_{rank}.pickle").read_bytes()) for rank in range(world_size)]

    return run
