"""How a task's end becomes the exit code of the process, in single runs and in multiruns."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import run

SCRIPT = """
import os, sys
from dino.config import save_config
from dino.launch import main, run_directory

@main
def task(config):
    directory = run_directory(config)
    (directory / "seen").write_text(os.getcwd())
    save_config(config, directory)
    if config.name == "stops":
        raise SystemExit(75)
    if config.name == "bad":
        raise ValueError("dataset.root=nowhere: no images")
    if config.name == "breaks" or (config.name == "one_breaks" and config.seed == 1):
        raise RuntimeError("the reason")
    print("finished", config.seed)

if __name__ == "__main__":
    task()
"""

LINES = {
    "fine": ["name=fine", "run_dir=here/a=b"],
    "stops": ["name=stops"],
    "bad": ["name=bad"],
    "breaks": ["name=breaks"],
    "sweep": ["-m", "name=one_breaks", "seed=0,1,2"],
}


@dataclass(frozen=True)
class Outcome:
    exit_code: int
    stdout: str
    stderr: str
    directory: Path


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    script = tmp_path_factory.mktemp("script") / "script.py"
    script.write_text(SCRIPT)

    def outcome(name: str) -> Outcome:
        directory = tmp_path_factory.mktemp(name)
        arguments = [line.replace("here/a=b", '"here/a=b"') for line in LINES[name]]
        command = [sys.executable, str(script), *arguments]
        done = run(command, cwd=directory)
        return Outcome(done.returncode, done.stdout, done.stderr, directory)

    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(LINES, pool.map(outcome, LINES), strict=True))


def test_a_run_goes_where_run_dir_says_and_does_not_change_directory(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["fine"]
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (0, "finished 0\n", "")
    run_dir = outcome.directory / "here" / "a=b"
    assert (run_dir / "seen").read_text() == str(outcome.directory)
    assert (run_dir / ".hydra" / "overrides.yaml").is_file()
    assert f"run_dir: {run_dir}" in (run_dir / "config.yaml").read_text()
    assert [path.name for path in outcome.directory.iterdir()] == ["here"]


def test_the_exit_code_is_the_one_the_task_asks_for(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["stops"].exit_code == 75


def test_a_value_error_of_the_task_is_bad_configuration(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["bad"]
    assert (outcome.exit_code, outcome.stderr) == (2, "error: dataset.root=nowhere: no images\n")


def test_any_other_exception_shows_its_traceback_and_nothing_of_hydra(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["breaks"]
    assert outcome.exit_code == 1
    assert outcome.stderr.endswith("RuntimeError: the reason\n")
    assert "HYDRA_FULL_ERROR" not in outcome.stderr


def test_in_a_multirun_the_other_points_go_on(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["sweep"]
    assert outcome.exit_code == 1
    assert outcome.stdout == "finished 0\nfinished 2\n"
    (sweep,) = (outcome.directory / "outputs" / "sweeps").iterdir()
    assert sorted(path.name for path in sweep.iterdir()) == ["0", "1", "2", "multirun.yaml"]
    assert all((sweep / point / "seen").is_file() for point in "012")
    assert f"run_dir: {sweep / '1'}" in (sweep / "1" / "config.yaml").read_text()
    assert outcome.stderr.endswith(f"1 of the points failed:\n  exit code 1: {sweep / '1'}\n")
