"""Starting the real programs, and looking at what they leave; for the tests of whole runs."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
DINO = str(Path(sys.executable).with_name("dino"))  # the command, as it was installed
TINY = [  # a network and a run of seconds
    "backbone.depth=1",
    "backbone.embed_dim=32",
    "backbone.num_heads=2",
    "head.hidden_dim=32",
    "head.bottleneck_dim=16",
    "head.out_dim=64",
    "dataset.batch_size=64",
    "augmentation.num_local_views=2",
    "schedule.lr.warmup_epochs=1",
    "loss.warmup_teacher_temp_epochs=1",
    "trainer.epochs=2",
    "trainer.num_threads=1",
    "trainer.precision=fp32",
    "trainer.limit_steps_per_epoch=6",
    "trainer.limit_evaluation_samples=200",
    "monitor.every_steps=1",
    "monitor.report=false",
]
TIMEOUT_S = 300


def command(*overrides: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "train.py"), *TINY, *overrides]


def train(*overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs to the end."""
    return run(command(*overrides), cwd=cwd)


def run(words: list[str], *, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Any program, to its end."""
    return finish(spawn(words, cwd=cwd))


def start(*overrides: str, cwd: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """In a session, and so in a process group, of its own."""
    return spawn(command(*overrides), cwd=cwd, environment=environment)


def start_ranks(count: int, *overrides: str, cwd: Path) -> list[subprocess.Popen[str]]:
    """`count` ranks on this machine, as a cluster's scheduler starts them: each by itself."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        start(*overrides, cwd=cwd, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


def spawn(words: list[str], *, cwd: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Modules of tests/ can be named as `_target_`. A machine under load may refuse a new process for a moment."""
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY / "tests"), **(environment or {})}
    for attempt in range(5):
        try:
            return subprocess.Popen(
                words,
                cwd=cwd,
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        except OSError as error:
            refused = error
            time.sleep(2**attempt)
    raise refused


def finish(process: subprocess.Popen[str], timeout: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """Waits for the end; a process that does not come to it is killed with its group."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str], timeout: float = TIMEOUT_S) -> None:
    """Polls a thousand times a second; fails if the process ends first."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} before it happened: {process.communicate()}"
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.001)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# ---------------------------------------------------------------------- what a run leaves


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def status(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return content


def last_state(run_dir: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(run_dir / "checkpoints" / "last.pt", weights_only=True)
    return state


def assert_same_run(actual: Path, expected: Path) -> None:
    """Bit for bit: everything in the last checkpoint, and every line of `metrics.jsonl`; only times may differ."""
    ours, theirs = (without_times(metrics(run_dir)) for run_dir in (actual, expected))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert ours == theirs
    different = differences(*(without_times(last_state(run_dir)) for run_dir in (actual, expected)))
    assert not different, different


def differences(actual: Any, expected: Any, name: str = "state") -> list[str]:
    """The names of all leaves of two nested values that are not equal bit for bit."""
    if isinstance(expected, dict) and isinstance(actual, dict) and actual.keys() == expected.keys():
        return [line for key in expected for line in differences(actual[key], expected[key], f"{name}[{key!r}]")]
    if isinstance(expected, list | tuple) and isinstance(actual, list | tuple) and len(actual) == len(expected):
        pairs = enumerate(zip(actual, expected, strict=True))
        return [line for index, pair in pairs for line in differences(*pair, f"{name}[{index}]")]
    if isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor):
        same = actual.dtype == expected.dtype and torch.equal(actual, expected)
    else:
        same = actual == expected or (actual != actual and expected != expected)  # NaN is equal to NaN here
    return [] if same else [f"{name}: {actual} in place of {expected}"]


def without_times(value: Any) -> Any:
    """The same nested value without what tells of time, memory and machine."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if not _tells_of_the_machine(str(key))}
        return {key: without_times(item) for key, item in kept.items()}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def _tells_of_the_machine(key: str) -> bool:
    return key.startswith("perf/") or key in ("time", "train_time_s", "provenance")
