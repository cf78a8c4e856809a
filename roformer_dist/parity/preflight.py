"""Before a run: a small copy of it on the run's own ranks, groups and kernel, against one process on rank 0."""

from __future__ import annotations

import gc
import hashlib
import json
import socket
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.cuda import nccl

import roformer_dist
from roformer_dist.config import Config
from roformer_dist.data.files import atomic_file
from roformer_dist.engine.agreement import together
from roformer_dist.engine.deepspeed_config import Precision
from roformer_dist.kernels.attention import Kernel
from roformer_dist.parallel.comm import Comm
from roformer_dist.parallel.mesh import Mesh
from roformer_dist.parity.check import Report, check_all, one_thread
from roformer_dist.parity.command import print_report, verdict
from roformer_dist.parity.compare import Outcome
from roformer_dist.parity.problem import Problem, make_problem
from roformer_dist.parity.processes import on_engine

RECORD = "preflight.json"
# What it should cost a job. A comparison that is under way is finished: half of it would prove nothing.
LIMIT_S = 30.0
PACKAGES = ("torch", "deepspeed", "numpy", "flash-attn", "triton")


class PreflightFailed(RuntimeError):
    """The mesh does not compute what one process computes; raised on every rank."""


def preflight(
    config: Config, mesh: Mesh, kernel: Kernel, precision: Precision, run_dir: Path, device: torch.device
) -> str:
    """Compare, or find that this configuration has passed in this environment; what happened, in words.

    All ranks call it together. Nothing of it stays: no memory, no hooks, and random generators as they were.

    Raises:
        PreflightFailed: something is out of its bound; rank 0 has printed the table.
    """
    world, started = mesh.world, time.perf_counter()
    speaks = world.rank == 0
    problem = together(lambda: make_problem(config, dp_size=mesh.dp_size), world, device)
    placement = _placement(socket.gethostname(), world, device)
    key = _key(problem, kernel, precision, device, placement) if speaks else ""
    known = torch.tensor(int(speaks and _read(run_dir).get("key") == key), device=device)
    if int(world.all_sum(known)):
        return "passed at an earlier start of this run, with the same configuration and environment"

    def run(problem: Problem, name: str) -> Outcome | None:
        outcome = on_engine(problem, mesh, kernel, precision, device)
        return outcome if speaks else None

    devices = [device] if device.type == "cuda" else []
    with one_thread(), torch.random.fork_rng(devices):
        outcomes = check_all(config, [precision], mesh.dp_size, run, kernel, device, world)
    _release(device)
    seconds = time.perf_counter() - started
    failed = torch.tensor(int(outcomes is not None and not outcomes.passed), device=device)
    if int(world.all_sum(failed)):
        if outcomes is not None:
            print_report(outcomes, Console())
        raise PreflightFailed(f"preflight: {verdict(outcomes) if outcomes else 'see rank 0'}")
    if outcomes is not None:
        _write(run_dir, {"key": key, "seconds": round(seconds, 2), "rows": outcomes.rows()})
    slow = (
        f", longer than the {LIMIT_S:.0f} s it should take; a restart with the same configuration skips it"
        if seconds > LIMIT_S
        else ""
    )
    return f"passed in {seconds:.1f} s{slow}{_nearest(outcomes)}"


def _nearest(report: Report | None) -> str:
    """How near the worst comparison came to its bound; on rank 0, which alone knows."""
    if report is None:
        return ""
    row = max(report.rows(), key=lambda row: row["error"] / row["allowed"] if row["allowed"] else 0.0)
    return f"; {row['compared']} nearest to their bound, {100 * row['error'] / row['allowed']:.0f} % of it"


def _placement(host: str, world: Comm, device: torch.device) -> list[int]:
    """For each rank, the first rank on its host; called on all ranks together, each with its host's name.

    What hosts are called is left out, so that other nodes after a requeue are the same placement.
    """
    name = hashlib.sha256(host.encode()).digest()
    own = torch.tensor(int.from_bytes(name[:7], "big"), dtype=torch.int64, device=device)
    hosts = world.all_gather(own).tolist()
    return [hosts.index(host) for host in hosts]


def _key(problem: Problem, kernel: Kernel, precision: str, device: torch.device, placement: list[int]) -> str:
    """What the outcome depends on: what is run, on which devices and hosts, with which code."""
    code = hashlib.sha256()
    for path in sorted(Path(roformer_dist.__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    facts: dict[str, Any] = {
        "config": problem.config.model_dump(mode="json", exclude={"name", "data", "logging"}),
        "lengths": problem.lengths,
        "replicas": problem.dp_size,
        "kernel": kernel.name,
        "precision": precision,
        "device": name,
        "placement": placement,
        "versions": {package: _version(package) for package in PACKAGES},
        "nccl": nccl.version() if device.type == "cuda" else None,
        "code": code.hexdigest(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    """None for what is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _read(run_dir: Path) -> dict[str, Any]:
    try:
        return json.loads((run_dir / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write(run_dir: Path, record: dict[str, Any]) -> None:
    with atomic_file(run_dir / RECORD) as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
