"""Running the command as a user does, on real text that every Python brings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

COMMAND = [sys.executable, "-m", "roformer_dist.cli"]
SEQ_LEN = 64
TIMEOUT_S = 120


def run(*arguments: str, expect: int = 0) -> str:
    """Standard output of ``roformer-dist ARGUMENTS``; the exit code must be ``expect``, without a traceback."""
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == expect, f"{arguments} ended with {done.returncode}:\n{said}"
    assert "Traceback" not in said, said
    return done.stdout


def train_alone(
    config: Path, run_dir: Path | str, *settings: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """One process of a run, as a launcher would start it, with ``settings`` (section.key=value) overridden."""
    command = [
        sys.executable,
        "-m",
        "roformer_dist.train",
        "--config",
        str(config),
        "--run-dir",
        str(run_dir),
    ]
    for setting in settings:
        command += ["--set", setting]
    environment = {**os.environ, **environment}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment
    )


def write_corpus(folder: Path) -> None:
    """The topics of Python's own help as documents: real prose; every eighth is held out."""
    from pydoc_data.topics import topics

    for index, (name, text) in enumerate(sorted(topics.items())):
        target = folder / ("validation" if index % 8 == 0 else "train")
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{name.replace('/', '_')}.txt").write_text(text, encoding="utf-8")


def prepare(folder: Path) -> Path:
    """Corpus, tokenizer, shards, plans and a configuration below ``folder``; the configuration's path."""
    write_corpus(folder / "corpus")
    model = str(folder / "tokenizer.model")
    run("data", "tokenizer", "--input", str(folder / "corpus/train"), "--vocab-size", "512", "--out", model)
    for split in ("train", "validation"):
        shards = str(folder / "shards" / split)
        run(
            "data", "shards", "--input", str(folder / "corpus" / split), "--tokenizer", model, "--out", shards
        )
        plan = str(folder / f"{split}.npz")
        run("data", "pack", "--shards", shards, "--seq-len", str(SEQ_LEN), "--out", plan)
    config = folder / "config.toml"
    config.write_text(CONFIG.format(folder=folder, seq_len=SEQ_LEN), encoding="utf-8")
    return config


CONFIG = """
name = "tiny"
[model]
vocab_size = 512
hidden_size = 32
num_layers = 2
num_heads = 4
num_kv_heads = 2
intermediate_size = 64
hidden_dropout = 0.1
[data]
tokenizer = "{folder}/tokenizer.model"
train = {{ shards = "{folder}/shards/train", plan = "{folder}/train.npz" }}
validation = {{ shards = "{folder}/shards/validation", plan = "{folder}/validation.npz" }}
[parallel]
sp_size = 2
zero_stage = 2
[train]
seq_len = {seq_len}
tokens_per_step = 512
micro_batch_size = 4
num_steps = 40
precision = "fp32"
[optimizer]
lr = 3e-3
[schedule]
kind = "cosine"
warmup_steps = 4
[checkpoint]
every_steps = 8
keep = 2
[validation]
every_steps = 20
rows = 8
[logging]
every_steps = 1
"""


def launch(config: Path, run_dir: Path, *extra: str) -> subprocess.Popen[str]:
    """``launch local`` in a session of its own, its output in run_dir's sibling log."""
    arguments = ["launch", "local", "--config", str(config), "--run-dir", str(run_dir), *extra]
    log = run_dir.with_suffix(".log").open("a")
    return subprocess.Popen([*COMMAND, *arguments], stdout=log, stderr=log, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str], run_dir: Path, *, expect: int = 0) -> str:
    """Wait for a launch; what it said. Every process it started must be gone."""
    process.wait(timeout=TIMEOUT_S)
    said = run_dir.with_suffix(".log").read_text()
    assert process.returncode == expect, f"ended with {process.returncode}:\n{said}"
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if str(run_dir) in (p.info["cmdline"] or [])]
    assert not left, f"processes {left} outlived their launch"
    return said


def wait_for_step(run_dir: Path, step: int) -> None:
    """Until metrics.jsonl has a point at ``step`` or later."""
    deadline = time.monotonic() + TIMEOUT_S
    while max([point["step"] for point in points(run_dir)], default=0) < step:
        assert time.monotonic() < deadline, run_dir.with_suffix(".log").read_text()
        time.sleep(0.05)


def points(run_dir: Path) -> list[dict[str, Any]]:
    """The finished lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step; a step that was logged twice is an error."""
    found: dict[int, float] = {}
    for point in points(run_dir):
        if "loss" in point:
            assert point["step"] not in found, f"step {point['step']} is logged twice"
            found[point["step"]] = point["loss"]
    return found


def kill_everything(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the command and all processes below it, as a node failure would."""
    everyone = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    for child in everyone:
        child.kill()
    process.wait()
    psutil.wait_procs(everyone, timeout=10)
