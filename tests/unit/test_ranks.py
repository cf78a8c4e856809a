"""Who this process is, from the variables of each launcher."""

from __future__ import annotations

import re
import socket
import subprocess
import sys

import pytest

from roformer_dist.engine.ranks import Ranks, free_port, read_ranks

TORCH = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),2",
    "SLURM_NODEID": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


def test_deepspeed_and_torchrun() -> None:
    assert read_ranks(TORCH) == Ranks(3, 1, 4, "node0", 29500, "torch", local_size=4)
    # Two hosts of two: torchrun and deepspeed each have a name for it.
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        assert read_ranks(TORCH | {name: "2"}).local_size == 2


def test_srun() -> None:
    assert read_ranks(SLURM) == Ranks(5, 1, 8, "node0", 29500, "slurm", local_size=3)
    assert read_ranks(SLURM | {"SLURM_NODEID": "2"}).local_size == 2
    assert read_ranks(SLURM | {"SLURM_CPUS_PER_TASK": "6"}).cores == 6


def test_a_batch_script_is_no_task() -> None:
    # sbatch sets the rank variables for the script itself too; only srun makes a step.
    assert read_ranks(without(SLURM, "SLURM_STEP_ID") | {"SLURM_PROCID": "0"}).launcher == "none"


def test_a_launcher_inside_a_slurm_job_wins_over_slurm() -> None:
    assert read_ranks(SLURM | TORCH).launcher == "torch"


def test_without_a_launcher_this_is_the_only_process() -> None:
    ranks = read_ranks({"PATH": "/bin"})
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.launcher) == (0, 0, 1, "none")
    assert ranks.master_addr == "127.0.0.1"
    assert 1024 <= ranks.master_port < 65536


def test_a_shell_inside_an_allocation_is_no_task() -> None:
    assert read_ranks({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}).launcher == "none"


def test_one_process_of_a_launcher_needs_no_meeting_place() -> None:
    ranks = read_ranks({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    assert (ranks.world_size, ranks.launcher, ranks.master_addr) == (1, "torch", "127.0.0.1")


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        (
            without(TORCH, "LOCAL_RANK", "WORLD_SIZE"),
            "rank variables are incomplete: RANK set, LOCAL_RANK, WORLD_SIZE missing; start through deepspeed, "
            "torchrun or srun, or unset them to run one process",
        ),
        (
            without(TORCH, "RANK"),
            "rank variables are incomplete: LOCAL_RANK, WORLD_SIZE set, RANK missing; start through deepspeed, "
            "torchrun or srun, or unset them to run one process",
        ),
        (
            without(SLURM, "SLURM_LOCALID"),
            "rank variables are incomplete: SLURM_PROCID, SLURM_NTASKS set, SLURM_LOCALID missing; start through "
            "deepspeed, torchrun or srun, or unset them to run one process",
        ),
        (
            # Half of one launcher's variables is an error also where another's are whole.
            SLURM | {"RANK": "0"},
            "rank variables are incomplete: RANK set, LOCAL_RANK, WORLD_SIZE missing; start through deepspeed, "
            "torchrun or srun, or unset them to run one process",
        ),
        (TORCH | {"RANK": "4"}, "RANK = 4 is outside WORLD_SIZE = 4"),
        (TORCH | {"RANK": "-1"}, "RANK = -1 is outside WORLD_SIZE = 4"),
        (TORCH | {"RANK": "0", "WORLD_SIZE": "0"}, "RANK = 0 is outside WORLD_SIZE = 0"),
        (TORCH | {"RANK": ""}, "RANK = '' is not a number"),
        (TORCH | {"WORLD_SIZE": "four"}, "WORLD_SIZE = 'four' is not a number"),
        (SLURM | {"SLURM_NTASKS": "8(x2)"}, "SLURM_NTASKS = '8(x2)' is not a number"),
        (TORCH | {"MASTER_PORT": "x"}, "MASTER_PORT = 'x' is not a number"),
        (
            without(TORCH, "MASTER_ADDR"),
            "MASTER_ADDR is not set: 4 processes need a place to meet; export it in the job script (MASTER_ADDR: the "
            "first host, MASTER_PORT: a free port)",
        ),
        (
            without(SLURM, "MASTER_PORT"),
            "MASTER_PORT is not set: 8 processes need a place to meet; export it in the job script (MASTER_ADDR: the "
            "first host, MASTER_PORT: a free port)",
        ),
    ],
    ids=range(13),
)
def test_variables_that_make_no_sense_are_one_line(environment: dict[str, str], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        read_ranks(environment)


def test_a_free_port_can_be_listened_on() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))


def test_launchers_that_set_the_same_variables_are_told_apart() -> None:
    assert read_ranks(TORCH | {"TORCHELASTIC_RUN_ID": "none"}).launcher == "torchrun"
    assert read_ranks(TORCH | {"CROSS_SIZE": "1"}).launcher == "deepspeed"


def test_a_rank_ends_with_what_it_said_and_without_shutting_the_interpreter_down():
    program = (
        "import atexit, sys; from roformer_dist.engine.ranks import end_process; "
        "atexit.register(print, 'shutting down'); print('said', end=''); "
        "print('failed', end='', file=sys.stderr); end_process(2)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "said", "failed")
