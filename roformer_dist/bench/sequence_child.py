"""One rank of a sample of ``bench sequence``: build, warm up, time; rank 0 prints a line of JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from roformer_dist.batch import Batch, MaskSpec
from roformer_dist.bench.ours import model_config
from roformer_dist.bench.sequence import ALONE, OURS, RING
from roformer_dist.bench.train import Job
from roformer_dist.bench.train_child import DTYPES, peak_bytes, reset_peak
from roformer_dist.bench.work import draw_work
from roformer_dist.engine.engine import start_process_group, stop_process_group
from roformer_dist.engine.ranks import end_process, read_ranks
from roformer_dist.kernels.attention import SequenceOps, choose_kernel
from roformer_dist.model.roformer import build_model
from roformer_dist.objectives import SummedLoss
from roformer_dist.parallel.comm import Comm, GroupComm, SoloComm
from roformer_dist.parallel.invariants import NAMES, check_checksums, checksums, share
from roformer_dist.parallel.layout import ContiguousLayout, Layout
from roformer_dist.parallel.mesh import build_mesh
from roformer_dist.parallel.sequence_ops import sequence_ops, single_sequence_ops

# This rank's share of a step: forward and backward; returns its part of the mean loss.
Share = Callable[[], float]


def main(job: Job) -> None:
    """Run one rank of the job in this process, which must be fresh: memory is counted from its imports."""
    torch.set_num_threads(job.threads)
    ranks = read_ranks(os.environ)
    if ranks.world_size == 1:
        _measure(job, SoloComm())
        return
    start_process_group(ranks)
    try:
        _measure(job, GroupComm())
    finally:
        stop_process_group()


def _measure(job: Job, world: Comm) -> None:
    build = _builder(job.contender)
    batch = whole_batch(job)
    reset_peak()
    baseline = peak_bytes()
    network, run = build(job, batch, world)
    loss = norm = 0.0
    seconds, cpu_seconds = [], []
    for _ in range(job.warmup_steps + job.steps):
        network.zero_grad(set_to_none=True)
        _meet(world)
        start, cpu_start = time.perf_counter(), time.process_time()
        part = run()
        norm = _sum_gradients(network, world)
        loss = float(world.all_sum(torch.tensor(part, dtype=torch.float64)))
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    own = [float(peak_bytes() - baseline), *seconds, *cpu_seconds]
    ranks = world.all_gather(torch.tensor(own, dtype=torch.float64))
    if world.rank == 0:
        highest, total = ranks.amax(0).tolist(), ranks.sum(0).tolist()
        warmups, count = job.warmup_steps, len(seconds)
        figures = {
            "tokens": job.length,
            "dtype": job.dtype,
            "loss": loss,
            "grad_norm": norm,
            "step_seconds": highest[1 + warmups : 1 + count],
            "step_cpu_seconds": total[1 + count + warmups :],
            "peak_bytes_above_import": highest[0],
            "peak_bytes_by_rank": ranks[:, 0].tolist(),
            "parameters": sum(p.numel() for p in network.parameters()),
        }
        print(json.dumps(figures), flush=True)


def whole_batch(job: Job) -> Batch:
    """The row before it is sliced, the same on every rank."""
    work = draw_work(job)
    counters = torch.arange(job.length)[None]
    return Batch(
        work.input_ids,
        work.labels,
        work.position_ids,
        counters,
        MaskSpec.from_lengths([job.length], causal=True),
    )


def run_ours(job: Job, batch: Batch, ops: SequenceOps, layout: Layout, comm: Comm) -> tuple[nn.Module, Share]:
    """Our network under these operations; a step slices the row and checks the slices, as training does."""
    network = build_model(model_config(job), masked=False, seed=job.seed)
    loss = SummedLoss(network.to(DTYPES[job.dtype])).train()
    targets = int((batch.labels >= 0).sum())

    def run() -> float:
        local = layout.slice(batch, comm.rank)
        numbers = [*checksums([local]), *checksums(share([batch], comm.rank, comm.size))]
        sums = comm.all_sum(torch.tensor(numbers, dtype=torch.float64)).tolist()
        check_checksums(sums[: len(NAMES)], sums[len(NAMES) :], 0)
        nll_sum, _ = loss(local, ops)
        mean = nll_sum / targets
        mean.backward()
        return mean.item()

    return loss, run


def _ours(job: Job, batch: Batch, world: Comm) -> tuple[nn.Module, Share]:
    kernel, _ = choose_kernel("auto", "cpu")
    if job.contender == ALONE:
        return run_ours(job, batch, single_sequence_ops(kernel), ContiguousLayout(1), world)
    ring = world.size if job.contender == RING else 1
    mesh = build_mesh(world, ulysses_size=world.size // ring, ring_size=ring)
    ops, layout = sequence_ops(kernel, mesh)
    return run_ours(job, batch, ops, layout, world)


def _builder(name: str) -> Callable[[Job, Batch, Comm], tuple[nn.Module, Share]]:
    """What builds the contender, with everything that it needs imported."""
    if name in OURS:
        return _ours
    from roformer_dist.bench.sequence_peers import BUILDERS

    return BUILDERS[name]


def _sum_gradients(network: nn.Module, world: Comm) -> float:
    """Add up every gradient over the ranks, the same way for every contender; the norm of all of them."""
    squares = 0.0
    for parameter in network.parameters():
        assert parameter.grad is not None
        if world.size > 1:
            parameter.grad = world.all_sum(parameter.grad)
        squares += float(parameter.grad.norm(dtype=torch.float32)) ** 2
    return squares**0.5


def _meet(world: Comm) -> Tensor:
    return world.all_sum(torch.zeros(1))


if __name__ == "__main__":
    main(Job.from_json(sys.argv[1]))
    end_process(0)
