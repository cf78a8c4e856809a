"""train on two processes: a mesh that computes something else does not start, what passed is not done again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import TIMEOUT_S, prepare

from roformer_dist.engine.ranks import free_port

# A run of one step through the module that launchers start, after a patch.
TRAIN = "import sys\nfrom roformer_dist.train import main\n{patch}\nsys.exit(main(sys.argv[1:]))"
# The classic fault: the loss divided once too little, so that every gradient is sp_size times what it should be.
SCALED_BY_SP = """
from roformer_dist.engine import engine
original = engine.loss_scale
engine.loss_scale = lambda shape, num_valid: original(shape, num_valid) * shape.sp_size
"""
NO_TIME = """
from roformer_dist.parity import preflight
preflight.LIMIT_S = 0.0
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("preflight"))


def train(config: Path, run_dir: Path, patch: str, *extra: str) -> tuple[int, str, str]:
    """Exit code, the same on both processes; what they printed, and their errors."""
    steps = ["--set", "train.num_steps=1", "--set", "schedule.warmup_steps=0"]
    script = TRAIN.format(patch=patch)
    port = str(free_port())
    processes = []
    for rank in range(2):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment = {**os.environ, **ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        arguments = [sys.executable, "-c", script, "--config", str(config), "--run-dir", str(run_dir)]
        processes.append(
            subprocess.Popen(
                [*arguments, *steps, *extra],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
    try:
        said = [process.communicate(timeout=TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    out, errors = ("".join(parts) for parts in zip(*said))
    codes = {process.returncode for process in processes}
    assert len(codes) == 1, out + errors
    return codes.pop(), out, errors


def fact(run_dir: Path) -> str:
    return json.loads((run_dir / "environment.json").read_text())[-1]["preflight"]


def test_a_wrong_mesh_does_not_start_and_a_right_one_is_checked_once(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    code, out, errors = train(config, run_dir, SCALED_BY_SP)
    assert code == 1, out + errors
    assert "Traceback" not in out + errors, errors
    assert out.count("FAILED") >= 1
    assert out.count("compared") == 1, "the table is printed once"
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert "preflight: the mesh does not compute what one process computes: " in line
    assert "gradient" in line
    assert not (run_dir / "preflight.json").exists()
    assert not list(run_dir.glob("checkpoints/*"))

    code, out, errors = train(config, run_dir, NO_TIME)
    assert code == 0, out + errors
    assert "longer than the 0 s it should take" in fact(run_dir)
    record = json.loads((run_dir / "preflight.json").read_text())
    assert {row["failed"] for row in record["rows"]} == {0}

    # What has passed is not compared again: the fault would be found.
    code, out, errors = train(config, run_dir, SCALED_BY_SP)
    assert code == 0, out + errors
    assert fact(run_dir).startswith("passed at an earlier start of this run")


def test_without_it_the_run_says_so(config: Path, tmp_path: Path) -> None:
    code, out, errors = train(config, tmp_path / "run", "", "--set", "parallel.preflight=false")
    assert code == 0, out + errors
    assert fact(tmp_path / "run") == "off: parallel.preflight = false, nothing was compared"
    assert out.count("nothing was compared") == 1
    assert not (tmp_path / "run" / "preflight.json").exists()
