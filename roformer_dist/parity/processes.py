"""Parity on real processes: DeepSpeed's Engine, its ZeRO stage, and messages over gloo."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from roformer_dist.batch import Batch
from roformer_dist.config import Config, derive
from roformer_dist.engine.deepspeed_config import Precision
from roformer_dist.engine.engine import (
    Engine,
    gradients,
    master_parameters,
    start_process_group,
    stop_process_group,
)
from roformer_dist.engine.ranks import Ranks, end_process, free_port
from roformer_dist.kernels.attention import Kernel
from roformer_dist.model.roformer import build_for
from roformer_dist.parallel.comm import Comm, GroupComm
from roformer_dist.parallel.mesh import Mesh, build_mesh
from roformer_dist.parallel.sequence_ops import sequence_ops
from roformer_dist.parity.check import CPU, Report, check_all, kernel_here, one_thread
from roformer_dist.parity.compare import Outcome
from roformer_dist.parity.mesh import on_mesh
from roformer_dist.parity.problem import Problem


class EngineReplica:
    """A rank as it trains: the product's Engine, with DeepSpeed inside."""

    def __init__(self, problem: Problem, mesh: Mesh, kernel: Kernel, precision: Precision) -> None:
        config = problem.config
        ops, self.layout = sequence_ops(kernel, mesh, config.parallel.head_chunks)
        self.network = build_for(config.model, config.objective, seed=problem.seed)
        self.engine = Engine(config, derive(config, mesh.world.size), precision, self.network, ops)

    def forward_backward(self, micro_batches: Sequence[Batch], num_valid: int) -> float:
        """See Replica."""
        return self.engine.forward_backward(micro_batches, num_valid)[0]

    def gradients(self) -> dict[str, Tensor]:
        """See Replica."""
        return gradients(self.engine)

    def update(self, lr: float) -> float:
        """See Replica."""
        return self.engine.update(lr)

    def parameters(self) -> dict[str, Tensor]:
        """See Replica."""
        return master_parameters(self.engine)


def on_engine(
    problem: Problem, mesh: Mesh, kernel: Kernel, precision: Precision, device: torch.device
) -> Outcome:
    """Train ``problem`` through the Engine on the ranks of ``mesh``, and leave nothing of it behind."""
    replica = EngineReplica(problem, mesh, kernel, precision)
    try:
        return on_mesh(problem, mesh, replica.layout, replica, device)
    finally:
        replica.engine.close()


def check_on_processes(config: Config, precisions: list[str], count: int) -> Report:
    """Start ``count`` processes on this machine's CPU and compare what they train."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # inherited; a laptop's one GPU would not hold several ranks
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "report"
        spawn(_process, (count, port, config, precisions, str(result)), nprocs=count)
        return Report.from_dict(json.loads(result.read_text()))


def _process(rank: int, count: int, port: int, config: Config, precisions: list[str], result: str) -> None:
    device = start_process_group(Ranks(rank, rank, count, "127.0.0.1", port, "parity", count))
    try:
        report = check_in_group(config, precisions, GroupComm(), device)
        if report:
            Path(result).write_text(json.dumps(asdict(report)))
    finally:
        stop_process_group()
    end_process(0)


def check_in_group(config: Config, precisions: list[str], world: Comm, device: torch.device) -> Report | None:
    """Compare on the processes of ``world``, which all call this; rank 0 gets the report."""
    mesh = build_mesh(world, ulysses_size=config.parallel.ulysses, ring_size=config.parallel.ring_size)
    kernel = kernel_here(config)

    def run(problem: Problem, precision: str) -> Outcome | None:
        assert precision in ("fp32", "bf16")
        outcome = on_engine(problem, mesh, kernel, precision, device)
        return outcome if world.rank == 0 else None

    with one_thread():
        return check_all(config, precisions, mesh.dp_size, run, kernel, CPU, world)
