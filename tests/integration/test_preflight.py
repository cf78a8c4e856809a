"""train on two processes: a mesh that computes something else does not start, what passed is not done again.

A step that trains something else on one of them ends the run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import TIMEOUT_S, prepare

from roformer_dist.engine.ranks import free_port

# A run of one step through the module that launchers start, after a patch; it ends as the module does.
TRAIN = """
import sys
from roformer_dist.engine.ranks import end_process
from roformer_dist.train import main
{patch}
end_process(main(sys.argv[1:]))
"""
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


# Runs one after the other in two processes that meet once: rank 1 does the damage, in the second step.
RUNS = """
import os, sys
from dataclasses import replace
from functools import lru_cache
from roformer_dist.engine import engine
from roformer_dist.engine.ranks import end_process
from roformer_dist.parallel.layout import ContiguousLayout
from roformer_dist.train import main

engine.start_process_group = lru_cache(lambda ranks, start=engine.start_process_group: start(ranks))
stop, engine.stop_process_group = engine.stop_process_group, lambda: None
wrong = os.environ["RANK"] == "1"
step, cut = engine.Engine.step, ContiguousLayout.slice
damage, number = "none", 0

def damaged_step(self, batches, num_valid, lr):
    global number
    number += 1
    result = step(self, batches, num_valid, lr)
    if wrong and number == 2 and damage == "norm":
        result = replace(result, grad_norm=result.grad_norm * 1.001)
    if wrong and number == 2 and damage == "targets":
        result = replace(result, num_valid=result.num_valid - 1)
    return result

def damaged_slice(self, batch, rank):
    part = cut(self, batch, rank)
    if wrong and number == 1 and damage in ("labels", "input_ids"):
        values = getattr(part, damage).clone()
        values[-1, -2] += 1
        part = replace(part, **{damage: values})
    return part

engine.Engine.step, ContiguousLayout.slice = damaged_step, damaged_slice
for damage in ("none", "labels", "input_ids", "norm", "targets"):
    number = 0
    for stream in (sys.stdout, sys.stderr):
        print("begin", damage, file=stream, flush=True)
    code = main([*sys.argv[2:], "--run-dir", os.path.join(sys.argv[1], damage)])
    print("end", code, "after", number, "steps", flush=True)
stop()
end_process(0)
"""
SETTINGS = {
    "parallel.preflight": "false",
    "train.num_steps": 3,
    "schedule.warmup_steps": 0,
    "validation.every_steps": 3,
    "validation.rows": 2,
    "checkpoint.every_steps": 3,
    "train.tokens_per_step": 256,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("preflight"))


def train(config: Path, run_dir: Path, patch: str, *extra: str) -> tuple[int, str, str]:
    """Exit code, the same on both processes; what they printed, and their errors."""
    steps = ["--set", "train.num_steps=1", "--set", "schedule.warmup_steps=0"]
    arguments = ["--config", str(config), "--run-dir", str(run_dir), *steps, *extra]
    codes, out, errors = on_two_processes(TRAIN.format(patch=patch), *arguments)
    assert len(set(codes)) == 1, (out, errors)
    return codes[0], "".join(out), "".join(errors)


def on_two_processes(script: str, *arguments: str) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, output and errors of a script that two processes run as ranks of one job."""
    port, processes = str(free_port()), []
    for rank in range(2):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment = {**os.environ, **ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", script, *arguments],
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
    out, errors = (list(texts) for texts in zip(*said))
    return [process.returncode for process in processes], out, errors


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


def sections(said: str) -> dict[str, str]:
    """What was printed in each of the runs."""
    parts = (part.partition("\n") for part in said.split("begin ")[1:])
    return {name: text for name, _, text in parts}


def test_damage_in_a_step_of_one_rank_ends_the_run_with_one_line(config: Path, tmp_path: Path) -> None:
    arguments = [str(tmp_path), "--config", str(config)]
    for name, value in SETTINGS.items():
        arguments += ["--set", f"{name}={value}"]
    codes, *said = on_two_processes(RUNS, *arguments)
    assert codes == [0, 0], said
    out, errors = ([sections(text) for text in texts] for texts in said)
    assert all("end 0 after 3 steps" in each["none"] for each in out), said
    expected = {
        "labels": "error: step 2: checksum of labels over the ranks 0x",
        "input_ids": "error: step 2: checksum of input_ids over the ranks 0x",
        "norm": "error: step 2: the gradient norm is ",
        "targets": "error: step 2: the ranks saw ",
    }
    for damage, line in expected.items():
        assert all("end 1 after 2 steps" in each[damage] for each in out), (damage, said)
        (told,) = [text for each in errors for text in each[damage].splitlines()]
        assert told.startswith(line), told
