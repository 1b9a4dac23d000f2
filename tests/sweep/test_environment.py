"""What a job inherits, and where it finds its code."""

import os
from pathlib import Path

import pytest

from dino.sweep.environment import child_environment, cleaned, cleaned_process

POISON = {
    "SLURM_JOB_ID": "1",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_EXPORT_ENV": "NONE",
    "SLURMD_NODENAME": "n1",
    "SBATCH_PARTITION": "nowhere",
    "SRUN_CPUS_PER_TASK": "99",
    "SALLOC_PARTITION": "nowhere",
    "SQUEUE_FORMAT": "%t",
    "SCANCEL_INTERACTIVE": "1",
    "SINFO_FORMAT": "%t",
    "SACCT_FORMAT": "state",
    "PMI_RANK": "3",
    "PMIX_RANK": "3",
    "OMPI_COMM_WORLD_RANK": "3",
    "MPI_LOCALRANKID": "3",
    "SUBMITIT_EXECUTOR": "local",
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "3",
    "LOCAL_WORLD_SIZE": "8",
    "GROUP_RANK": "1",
    "ROLE_RANK": "3",
    "MASTER_ADDR": "elsewhere",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RUN_ID": "x",
}
WANTED = {
    "SLURM_CONF": "/etc/slurm/slurm.conf",
    "SLURM_JWT": "token",
    "PATH": "/bin",
    "HYDRA_FULL_ERROR": "1",
    "MPI_HOME": "/opt/mpi",
    "RANKING": "kept",
}


def test_nothing_of_another_job_is_inherited() -> None:
    assert cleaned({**POISON, **WANTED}) == WANTED


def test_the_process_has_its_variables_back_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in POISON.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with cleaned_process():
        assert not POISON.keys() & os.environ.keys()
    assert dict(os.environ) == before


def test_modules_of_the_copied_folder_come_from_the_copy(tmp_path: Path) -> None:
    source, code = tmp_path / "source", tmp_path / "code"
    for folder in (source / "src", source / "mine", source / "ignored", code / "src", code / "mine"):
        folder.mkdir(parents=True)
    entries = [str(source / "src"), "mine", str(source / "ignored"), "", "/opt/others", str(source / "src")]
    environment = {"PYTHONPATH": ":".join(entries), "OTHER": "1"}
    child = child_environment(environment, code, source, cwd=source)
    expected = [code / "src", code / "mine", source / "ignored", Path("/opt/others")]
    assert child == {"PYTHONPATH": ":".join(map(str, expected)), "OTHER": "1"}
    assert child_environment({}, code, source, cwd=source) == {"PYTHONPATH": str(code / "src")}
