"""One run on two nodes of a real Slurm: the tasks of a step find each other by themselves."""

import signal
from pathlib import Path

from command_line import assert_same_run, command, finish, spawn, start_ranks, status, wait_until

RUN = ["run_dir=run", "dataset.batch_size=32", "trainer.save_every_steps=2", "backbone.drop_path_rate=0.3"]
SRUN = ["srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1"]


def test_the_tasks_of_a_step_are_the_ranks_of_a_run(slurm: dict[str, str], tmp_path: Path) -> None:
    """Preempted as Slurm does it, by a signal to all tasks; started again, it equals two ranks started by hand."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    for folder in (parts, whole):
        folder.mkdir()
    process = spawn([*SRUN, *command(*RUN)], cwd=parts, environment=slurm)
    wait_until(lambda: (parts / "run/checkpoints/step_00000004.pt").exists(), process)
    # srun hands this one on to its tasks, as Slurm does ahead of a time limit (--signal=USR1@60).
    process.send_signal(signal.SIGUSR1)
    preempted = finish(process, timeout=60)
    assert preempted.returncode == 75, preempted
    assert status(parts / "run")["state"] == "preempted"
    resumed = finish(spawn([*SRUN, *command(*RUN)], cwd=parts, environment=slurm))
    assert resumed.returncode == 0, resumed
    assert resumed.stdout.count("batch       64 images a step (32 x 1 on each of 2 ranks)") == 1
    by_hand = [finish(process) for process in start_ranks(2, *RUN, cwd=whole)]
    assert [result.returncode for result in by_hand] == [0, 0]
    assert_same_run(parts / "run", whole / "run")
