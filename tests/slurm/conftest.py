"""A real Slurm of two nodes on this machine, for the time of the tests; slurm-up.sh says what it needs."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sweep_command import WorkingCopy, squeue, until

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever needs a Slurm is slow."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which srun, sbatch and the others speak to the cluster."""
    folder = tempfile.mkdtemp(prefix="slurm-")  # a short path: it holds sockets
    own = {"SLURMLAB_DIR": folder, "SLURMLAB_OWNER": str(os.getpid())}
    extra = Path(folder, "extra.conf")
    # As many tasks in an array, so that a sweep of 60 trials needs three; and the partition that the README names.
    extra.write_text("MaxArraySize=25\nPartitionName=gpu Nodes=ALL MaxTime=INFINITE State=UP\n")
    environment = {**os.environ, **own, "SLURMLAB_EXTRA": str(extra)}
    try:
        up = subprocess.run(
            [HERE / "slurm-up.sh"],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if up.returncode == 77:
            pytest.skip(f"{up.stderr.strip()}: apt-get install slurmctld slurmd slurm-client munge")
        assert up.returncode == 0, up.stderr
        yield {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"}
    finally:
        subprocess.run([HERE / "slurm-down.sh"], env=environment, stdin=subprocess.DEVNULL, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def here(slurm: dict[str, str], tmp_path: Path) -> Iterator[WorkingCopy]:
    """A working copy to submit from; what it leaves in the queue is cancelled."""
    yield WorkingCopy.make(tmp_path / "copy", slurm)
    subprocess.run(["scancel", "--me"], env=slurm, check=True)
    until(lambda: not squeue(slurm, "%i"))
