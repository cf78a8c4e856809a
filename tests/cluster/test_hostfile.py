"""launch/deepspeed.sh over pdsh and ssh on two virtual hosts: arguments, environment, Ctrl-C, going on, failure."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from commands import TIMEOUT_S, losses, prepare, wait_for_step
from nodes import SSH, Nodes, missing, rank_environment

REPOSITORY = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing(*SSH)), reason=missing(*SSH))]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    # Hosts with processes of their own: at a signal, deepspeed ends every process of a name on each host.
    with Nodes(tmp_path_factory.mktemp("cluster") / "nodes", 2) as nodes:
        nodes.start_ssh()
        yield nodes


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("job"))


def start(nodes: Nodes, config: Path, run_dir: Path, *extra: str) -> subprocess.Popen[str]:
    hostfile = config.parent / "hostfile"
    hostfile.write_text("# two hosts\nn1 slots=1\nn2 slots=1\n")
    script = ["bash", "launch/deepspeed.sh", str(hostfile), str(config), "--run-dir", str(run_dir), *extra]
    # Only DS_ENV_FILE brings such a value to the other host.
    environment = rank_environment() | {"OMP_NUM_THREADS": "1", "TMPDIR": str(config.parent / "tmp")}
    (config.parent / "tmp").mkdir(exist_ok=True)
    with run_dir.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            nodes.command("n1", *script), stdout=log, stderr=log, text=True, env=environment, cwd=REPOSITORY
        )


def interrupt(process: subprocess.Popen[str]) -> None:
    """SIGINT to the script, which nsenter started."""
    for child in psutil.Process(process.pid).children():
        child.send_signal(signal.SIGINT)


def end(process: subprocess.Popen[str], run_dir: Path, *, expect: int) -> str:
    process.wait(timeout=TIMEOUT_S)
    said = run_dir.with_suffix(".log").read_text()
    assert process.returncode == expect, said
    assert "Traceback" not in said, said
    left = [path.name for path in (run_dir.parent / "tmp").glob("tmp.*")]
    assert not left, f"temporary files are left: {left}"
    return said


def test_ctrl_c_saves_and_the_same_command_finishes(nodes: Nodes, config: Path):
    # A directory that every shell on the way would like to take apart.
    run_dir = config.parent / "a run $HOME `id` 100%n 'one' \"two\" \\n"
    process = start(nodes, config, run_dir)
    wait_for_step(run_dir, 4)
    interrupt(process)
    said = end(process, run_dir, expect=130)
    assert "stopped by SIGTERM" in said
    assert json.loads((run_dir / "status.json").read_text())["state"] == "stopped"

    said = end(start(nodes, config, run_dir), run_dir, expect=0)
    assert "resumed after step" in said
    assert "1 threads a rank" in said
    assert sorted(losses(run_dir)) == list(range(1, 41))
    assert json.loads((run_dir / "status.json").read_text()) == {"state": "finished", "step": 40}


def test_a_bad_value_is_one_line_before_any_host_is_asked(nodes: Nodes, config: Path):
    run_dir = config.parent / "bad"
    said = end(start(nodes, config, run_dir, "--set", "train.num_step=5"), run_dir, expect=2)
    assert said.startswith("error: ")
    assert "num_step" in said
    assert len(said.splitlines()) == 1
    assert not run_dir.exists()


def test_a_failure_on_the_hosts_is_a_failure_here(nodes: Nodes, config: Path):
    # Fits one process and not two, so that only the ranks can find it.
    run_dir = config.parent / "mesh"
    misfit = ["--set", "parallel.sp_size=1", "--set", "train.micro_batch_size=8"]
    said = end(start(nodes, config, run_dir, *misfit), run_dir, expect=2)
    assert "n1: error: " in said
