"""launch/slurm/pretrain.sbatch under the real SLURM on two virtual hosts: train, be requeued, be cancelled, fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import finish, launch, losses, prepare, wait_for_step
from nodes import SLURM, Nodes, missing, rank_environment, wait_for

REPOSITORY = Path(__file__).parents[2]
JOB_S = 120.0

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing(*SLURM)), reason=missing(*SLURM))]


class Cluster:
    """Two hosts under SLURM, and jobs of the script on both."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.environment = rank_environment(nodes.start_slurm(cpus=2))

    def run(self, *arguments: str) -> str:
        return self.nodes.run("n1", *arguments, env=self.environment, cwd=REPOSITORY)

    def submit(self, config: Path, run_dir: Path, *extra: str) -> str:
        log = f"--output={run_dir}.log"
        script = ["launch/slurm/pretrain.sbatch", str(config), str(run_dir), *extra]
        return self.run("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", log, *script).strip()

    def facts(self, job: str) -> dict[str, str]:
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str) -> dict[str, str]:
        """What SLURM knows of the job once it has ended for good."""
        going_on = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING")
        wait_for(lambda: self.facts(job)["JobState"] not in going_on, f"job {job}", JOB_S)
        return self.facts(job)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Nodes(tmp_path_factory.mktemp("cluster") / "nodes", 2) as nodes:
        yield Cluster(nodes)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("job"))


def test_time_is_up_saves_requeues_and_goes_on_bit_identically(
    cluster: Cluster, config: Path, monkeypatch: pytest.MonkeyPatch
):
    run_dir = config.parent / "requeued"
    job = cluster.submit(config, run_dir, "--set", "optimizer.weight_decay=0.05")
    wait_for_step(run_dir, 4)
    # The signal that SLURM sends before the time limit, at once.
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    facts = cluster.wait(job)
    said = run_dir.with_suffix(".log").read_text()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), said
    assert "stopped by SIGUSR1" in said
    assert said.count("resumed after step") == 1
    assert "started by slurm" in said
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"
    assert {start["host"] for start in json.loads((run_dir / "environment.json").read_text())} == {"n1"}

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole = config.parent / "whole"
    finish(launch(config, whole, "--set", "optimizer.weight_decay=0.05"), whole)
    assert losses(run_dir) == losses(whole)


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, config: Path):
    run_dir = config.parent / "cancelled"
    job = cluster.submit(config, run_dir)
    wait_for_step(run_dir, 4)
    cluster.run("scancel", job)
    facts = cluster.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    assert "stopped by SIGTERM" in run_dir.with_suffix(".log").read_text()
    assert json.loads((run_dir / "status.json").read_text())["state"] == "stopped"


def test_a_failure_fails_the_job_and_is_not_requeued(cluster: Cluster, config: Path):
    run_dir = config.parent / "failed"
    job = cluster.submit(config, run_dir, "--set", "parallel.sp_size=4")
    facts = cluster.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0")
    said = run_dir.with_suffix(".log").read_text()
    assert "error: " in said
    assert "Traceback" not in said
