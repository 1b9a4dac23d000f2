"""Who a process is, by the environments of torchrun and Slurm, and what contradicts itself."""

import subprocess
import sys

import pytest

from dino.processes import FIRST_PORT, NUM_PORTS, Processes, first_host, slurm_port

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
}
SLURM_BATCH = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_NODELIST": "gpu[03,05]",
}
SLURM_STEP = SLURM_BATCH | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[03,05]",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
}


def test_without_a_launcher_there_is_one_process() -> None:
    alone = Processes.from_environment({"HOME": "/home/me"})
    assert alone == Processes(rank=0, world_size=1, local_rank=0)
    assert alone.is_main
    assert not alone.several


def test_torchrun_tells_everything() -> None:
    environment = dict(TORCHRUN)
    found = Processes.from_environment(environment)
    assert found == Processes(rank=5, world_size=8, local_rank=1)
    assert found.several
    assert not found.is_main
    assert environment == TORCHRUN


def test_torchrun_in_a_slurm_step_counts() -> None:
    """One Slurm task a machine starts torchrun, which starts the ranks."""
    step = SLURM_STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    assert Processes.from_environment(step | TORCHRUN) == Processes(rank=5, world_size=8, local_rank=1)


def test_a_task_of_a_slurm_step_finds_the_others() -> None:
    environment = dict(SLURM_STEP)
    assert Processes.from_environment(environment) == Processes(rank=6, world_size=8, local_rank=2)
    assert environment["MASTER_ADDR"] == "gpu03"
    first = SLURM_STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    Processes.from_environment(first)
    assert first["MASTER_PORT"] == environment["MASTER_PORT"]


def test_an_address_that_is_given_stays() -> None:
    environment = SLURM_STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    Processes.from_environment(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "1234")


def test_a_batch_script_and_a_step_of_one_task_are_single_processes() -> None:
    assert not Processes.from_environment(dict(SLURM_BATCH)).several
    one = SLURM_STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert Processes.from_environment(one) == Processes()
    assert "MASTER_PORT" not in one


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        (TORCHRUN | {"RANK": "two"}, "RANK='two': .*torchrun or srun"),
        (TORCHRUN | {"RANK": "-1"}, "RANK='-1': "),
        (TORCHRUN | {"WORLD_SIZE": ""}, "WORLD_SIZE='': "),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE=0: "),
        (TORCHRUN | {"LOCAL_RANK": "gpu0"}, "LOCAL_RANK='gpu0': "),
        (TORCHRUN | {"RANK": "8"}, "RANK=8: with WORLD_SIZE=8 use a number from 0 to 7"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 without MASTER_ADDR: "),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "here"}, "WORLD_SIZE=2 without MASTER_PORT: "),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT='http': "),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000: use a number from 1 to 65535"),
        (SLURM_STEP | {"SLURM_PROCID": "nine"}, "SLURM_PROCID='nine': "),
        (SLURM_STEP | {"SLURM_PROCID": "9"}, "RANK=9: with WORLD_SIZE=8"),
        ({k: v for k, v in SLURM_STEP.items() if k != "SLURM_STEP_NODELIST"}, "WORLD_SIZE=8 without MASTER_ADDR: "),
        (SLURM_STEP | {"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID='x': "),
    ],
)
def test_nonsense_is_refused_by_the_name_of_the_variable(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Processes.from_environment(dict(environment))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login1", "login1"),
        ("gpu07,gpu09", "gpu07"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[3,5-8]", "gpu3"),
        ("login1,gpu[07-09]", "login1"),
        ("rack[2-3]-node", "rack2-node"),
        ("rack[2-3]-node,login1", "rack2-node"),
        ("rack[1-2]n[03-04]", "rack1n03"),
        ("c-1-[10-12].cluster.org", "c-1-10.cluster.org"),
    ],
)
def test_the_first_host_is_read_off_slurms_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_jobs_steps_and_requeues_get_ports_of_their_own() -> None:
    job = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0"}
    others = [job | {"SLURM_JOB_ID": "4712"}, job | {"SLURM_STEP_ID": "1"}, job | {"SLURM_RESTART_COUNT": "1"}]
    ports = [slurm_port(environment) for environment in (job, *others)]
    assert len(set(ports)) == 4
    assert all(
        FIRST_PORT <= slurm_port({"SLURM_JOB_ID": str(number)}) < FIRST_PORT + NUM_PORTS for number in range(999)
    )


def test_asking_imports_no_torch() -> None:
    program = "import sys, dino.processes, dino.preemption; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
