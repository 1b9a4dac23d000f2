"""Which of the processes of a run this one is, read off the environment of torchrun or Slurm. Imports no torch."""

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

# Ports given to jobs: below those that Linux hands out by itself (32768 and up), above the usual services.
FIRST_PORT, NUM_PORTS = 20_000, 12_000
LARGEST_PORT = 65_535


@dataclass(frozen=True)
class Processes:
    """One rank of a run. `local_rank` counts the ranks of one machine, and chooses its GPU."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that prints and writes."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.world_size > 1

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] = os.environ) -> "Processes":
        """torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK) where there are any, otherwise those of a Slurm step.

        In a Slurm step of several tasks, MASTER_ADDR and MASTER_PORT are filled in where they are not given.

        Raises:
            ValueError: for variables that contradict each other or are missing.
        """
        if "WORLD_SIZE" in environment:
            rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
            local_rank = _number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else rank
        elif "SLURM_STEP_NUM_TASKS" in environment:  # a batch script outside of srun has no step of its own
            rank, world_size = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS")
            local_rank = _number(environment, "SLURM_LOCALID")
            if world_size > 1:
                if "SLURM_STEP_NODELIST" in environment:
                    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
                environment.setdefault("MASTER_PORT", str(slurm_port(environment)))
        else:
            return cls()
        if world_size < 1:
            raise ValueError("WORLD_SIZE=0: use the number of processes, 1 or more")
        if not 0 <= rank < world_size:
            raise ValueError(f"RANK={rank}: with WORLD_SIZE={world_size} use a number from 0 to {world_size - 1}")
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if world_size > 1 and name not in environment:
                raise ValueError(f"WORLD_SIZE={world_size} without {name}: start the processes with torchrun or srun")
        if world_size > 1 and not 0 < _number(environment, "MASTER_PORT") <= LARGEST_PORT:
            raise ValueError(f"MASTER_PORT={environment['MASTER_PORT']}: use a number from 1 to {LARGEST_PORT}")
        return cls(rank, world_size, local_rank)


def slurm_port(environment: Mapping[str, str]) -> int:
    """A port that every task of the step works out alike; another one for each job, step and requeue."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job, step, restarts = (_number(environment, name) if name in environment else 0 for name in names)
    return FIRST_PORT + (job * 31 + step * 7 + restarts) % NUM_PORTS


def first_host(node_list: str) -> str:
    """The first host of a list as Slurm writes it: `gpu[07-09,12],login1` -> `gpu07`."""
    first = re.split(r",(?![^\[]*\])", node_list)[0]  # at a comma outside of brackets
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None:
        raise ValueError(
            f"{name} is not set, though several processes were announced; start them with torchrun or srun"
        )
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r}: several processes were announced; start them with torchrun or srun")
    return int(text)
