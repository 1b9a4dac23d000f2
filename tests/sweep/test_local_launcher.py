"""Hydra's own way to a sweep on this machine: `python train.py -m hydra/launcher=local`."""

import signal
from pathlib import Path

import pytest
from command_line import finish, metrics, status
from sweep_command import SHORT, WorkingCopy, until

from dino.run import read_status

MINE = ["allowed_targets=[misbehaving]", "loss._target_=misbehaving.Misbehaving"]
HERE = ["-m", "hydra/launcher=local", "hydra.sweep.dir=s", "cluster.devices=[]", *SHORT]


@pytest.mark.slow
def test_local_points_are_bounded_and_fail_alone(tmp_path: Path) -> None:
    here = WorkingCopy.make(tmp_path / "copy")
    words = [*HERE, *MINE, "cluster.trials_on_cpu=2", "+loss.how=fine,raises,nothing"]
    result = here.run("train.py", *words)
    assert result.returncode == 1, result
    points = [here.folder / "s" / str(number) for number in range(3)]
    assert [status(point)["state"] for point in points] == ["finished", "failed", "finished"]
    failed = result.stderr.splitlines()[1]
    assert failed.startswith("  #1 ")
    assert "+loss.how=raises: exit code 1; see " in failed
    ended = min((point / "status.json").stat().st_mtime for point in points[:2])
    assert metrics(points[2])[0]["time"] > ended, "the third waited for a place"


@pytest.mark.slow
def test_a_signal_to_the_command_saves_all_local_points(tmp_path: Path) -> None:
    here = WorkingCopy.make(tmp_path / "copy")
    process = here.start("train.py", *HERE, "cluster.trials_on_cpu=2", "trainer.epochs=300", "seed=0,1,2")
    until(lambda: all(read_status(here.folder / "s" / number).get("step", -1) >= 3 for number in "01"))
    process.send_signal(signal.SIGTERM)
    assert finish(process, timeout=60).returncode == 75
    assert [status(here.folder / "s" / number)["state"] for number in "01"] == ["preempted"] * 2
    assert not (here.folder / "s" / "2").exists()
