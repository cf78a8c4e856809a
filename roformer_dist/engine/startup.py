"""Between the process group and the loop: mesh, precision, kernel, data, network, trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from roformer_dist.config import Config, RunShape
from roformer_dist.engine.agreement import together
from roformer_dist.engine.datasets import RunData
from roformer_dist.engine.deepspeed_config import Precision, check_precision
from roformer_dist.engine.engine import Engine
from roformer_dist.engine.metrics import matrix_product_rate
from roformer_dist.engine.precision import choose_precision, has_bf16_units
from roformer_dist.engine.ranks import Ranks
from roformer_dist.engine.run_dir import claim_run_dir, write_environment
from roformer_dist.engine.signals import StopFlag
from roformer_dist.engine.trainer import RunContext, Trainer
from roformer_dist.engine.zero import check_machine, check_partitions, describe
from roformer_dist.kernels.attention import HeadShape, Kernel, choose_kernel
from roformer_dist.model.roformer import build_for
from roformer_dist.parallel.comm import GroupComm
from roformer_dist.parallel.mesh import Mesh, build_mesh
from roformer_dist.parallel.sequence_ops import sequence_ops

# Compares a small copy of the run with one process on all ranks together; what it found, in words.
Preflight = Callable[[Config, Mesh, Kernel, Precision, Path, torch.device], str]


def build_trainer(
    config: Config,
    shape: RunShape,
    ranks: Ranks,
    run_dir: Path,
    device: torch.device,
    stop: StopFlag,
    preflight: Preflight,
) -> Trainer:
    """The trainer of this rank; everything that was chosen is printed once and recorded.

    Args:
        preflight: called where ranks share a sequence, before the network is built; what it raises ends the run.

    Raises:
        ValueError, OSError: the directory, the data, the kernel or the precision does not fit.
    """
    mesh = build_mesh(GroupComm(), ulysses_size=shape.ulysses_size, ring_size=shape.ring_size)
    world = mesh.world
    lock = together(lambda: claim_run_dir(run_dir, config) if world.rank == 0 else None, world, device)
    has_units, finding = has_bf16_units(device)
    everywhere = int(world.all_sum(torch.tensor([int(has_units)], device=device))) == shape.world_size
    precision, precision_reason = choose_precision(
        config.train.precision, everywhere=everywhere, finding=finding
    )
    together(lambda: check_precision(config.parallel.zero_stage, precision), world, device)
    together(
        lambda: check_machine(config.parallel, device.type, shape.world_size, ranks.local_size), world, device
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    heads = HeadShape(config.model.num_heads, config.model.kv_heads, config.model.head_size)
    kernel, kernel_reason = together(
        lambda: choose_kernel(config.train.kernel, device, dtype, heads), world, device
    )
    data = together(lambda: RunData(config, shape, mesh.dp_rank), world, device)
    checked = "not needed: no ranks share a sequence"
    if shape.sp_size > 1:
        checked = "off: parallel.preflight = false, nothing was compared"
        if config.parallel.preflight:
            checked = preflight(config, mesh, kernel, precision, run_dir, device)
    ops, layout = sequence_ops(kernel, mesh, config.parallel.head_chunks)
    network = build_for(config.model, config.objective, seed=config.train.seed)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    if config.parallel.quantized_weights:
        check_partitions(sizes, shape.world_size)
    engine = Engine(config, shape, precision, network, ops)
    rate = matrix_product_rate(device, dtype)
    facts = {
        "mesh": f"{shape.world_size} processes = dp {shape.dp_size} x sp {shape.sp_size} "
        f"(Ulysses {shape.ulysses_size} x ring {shape.ring_size}), "
        f"{describe(config.parallel)}, started by {ranks.launcher}",
        "preflight": checked,
        "precision": precision_reason,
        "kernel": f"{kernel.name}: {kernel_reason}",
        "model": f"{sum(sizes.values()) / 1e6:.1f} M parameters, seq_len {config.train.seq_len}, "
        f"{config.train.tokens_per_step:,} tokens a step, {config.train.num_steps} steps",
        "device": f"{device.type}, {torch.get_num_threads()} threads a rank, "
        f"{rate / 1e9:.0f} GFLOP/s in {precision} matrix products",
    }
    if ranks.rank == 0:
        write_environment(run_dir, facts)
        for name, fact in facts.items():
            print(f"{name:>9}  {fact}", flush=True)
    return Trainer(RunContext(config, shape, mesh, layout, run_dir, rate, stop, lock), engine, data)
