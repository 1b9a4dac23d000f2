"""The environment of a job: what it must not inherit from where it was submitted, and where it finds its code."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

# Left behind by an interactive session, a batch script, mpirun or torchrun: in a job they would speak of another one.
INHERITED = re.compile(
    r"(SLURMD?|SLURMSTEPD|SBATCH|SRUN|SALLOC|SATTACH|SQUEUE|SCANCEL|SINFO|SACCT|SCONTROL)_.*"
    r"|(PMI|PMI2|PMIX|OMPI|PRTE|MV2_COMM_WORLD|SUBMITIT|TORCHELASTIC|ROLE)_.*|MPI_LOCAL(RANKID|NRANKS)"
    r"|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|MASTER_ADDR|MASTER_PORT"
)
KEPT = ("SLURM_CONF", "SLURM_JWT")  # where Slurm is, and the way in


def cleaned(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what belongs to another job, step or group of ranks."""
    return {name: value for name, value in environment.items() if name in KEPT or not INHERITED.fullmatch(name)}


@contextlib.contextmanager
def cleaned_process() -> Iterator[None]:
    """`os.environ` is cleaned inside, for libraries that hand it on."""
    before = dict(os.environ)
    after = cleaned(before)
    for name in before.keys() - after.keys():
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update({name: before[name] for name in before.keys() - after.keys()})


def child_environment(environment: Mapping[str, str], code: Path, source: Path, cwd: Path) -> dict[str, str]:
    """For a training process: `PYTHONPATH` finds what was copied in the copy.

    Args:
        code: the copy.
        source: the folder that was copied; entries inside it become entries of the copy, if they are there.
        cwd: where relative entries start.
    """
    entries = [code / "src"]
    for entry in environment.get("PYTHONPATH", "").split(os.pathsep):
        if entry:
            entries.append(_in_copy((cwd / entry).resolve(), code, source.resolve()))
    names = dict.fromkeys(str(entry) for entry in entries)
    return {**environment, "PYTHONPATH": os.pathsep.join(names)}


def _in_copy(path: Path, code: Path, source: Path) -> Path:
    if path.is_relative_to(source):
        copied = code / path.relative_to(source)
        return copied if copied.exists() else path
    return path
