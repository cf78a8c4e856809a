"""A small problem in one process and on in-process ranks, and the bound that both must meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from roformer_dist.batch import IGNORE_INDEX, Batch, MaskSpec
from roformer_dist.config.model import ModelConfig
from roformer_dist.kernels.attention import Kernel, SequenceOps
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.model.roformer import build_model
from roformer_dist.objectives import SummedLoss
from roformer_dist.parallel.comm import Comm
from roformer_dist.parallel.in_process import run_in_process
from roformer_dist.parallel.mesh import Mesh, build_mesh
from roformer_dist.parallel.sequence_ops import sequence_ops, single_sequence_ops

VOCAB, SEQ_LEN = 29, 23
# Odd lengths, one-token documents, and 23 tokens in a row, which neither 2 nor 4 ranks divide.
DOCUMENTS = [[9, 1, 13], [23], [1, 1, 21]]

Gradients = dict[str, Tensor]
Outcome = tuple[float, Gradients]


def model_config(**changes: Any) -> ModelConfig:
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 4,
        "intermediate_size": 48,
        # Wide enough that attention is far from uniform and a wrong score is seen.
        "init_std": 0.15,
    }
    return ModelConfig(**values | changes)


def make_batch(*, causal: bool = True, seq_len: int = SEQ_LEN, window: int | None = None) -> Batch:
    generator = torch.Generator().manual_seed(3)
    documents = DOCUMENTS if seq_len == SEQ_LEN else [[seq_len - 3, 3], [seq_len]]
    shape = (len(documents), seq_len)
    ids = torch.randint(0, VOCAB, shape, generator=generator)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])
    if causal:
        labels = ids.roll(-1, dims=1)
        labels[positions.roll(-1, dims=1) == 0] = IGNORE_INDEX
    else:
        labels = torch.where(torch.rand(shape, generator=generator) < 0.3, ids, IGNORE_INDEX)
    counters = torch.arange(ids.numel()).reshape(shape) + 5000
    flat = [n for row in documents for n in row]
    return Batch(ids, labels, positions, counters, MaskSpec.from_lengths(flat, causal=causal, window=window))


def run(
    model: ModelConfig,
    batch: Batch,
    ops: SequenceOps,
    num_valid: float,
    *,
    masked: bool,
    dtype: torch.dtype = torch.float32,
) -> Outcome:
    """This rank's share of the loss and of the gradients: sums, divided once by the whole step's targets."""
    network = build_model(model, masked=masked, seed=11).to(dtype)
    nll_sum, _ = SummedLoss(network)(batch, ops)
    (nll_sum / num_valid).backward()
    return nll_sum.item(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def one_process(
    model: ModelConfig,
    batch: Batch,
    *,
    masked: bool,
    kernel: Kernel | None = None,
    dtype: torch.dtype = torch.float32,
) -> Outcome:
    ops = single_sequence_ops(kernel or SdpaKernel())
    nll_sum, gradients = run(model, batch, ops, batch.num_valid, masked=masked, dtype=dtype)
    return nll_sum / batch.num_valid, gradients


def many_ranks(
    mesh: int | tuple[int, int],
    model: ModelConfig,
    batch: Batch,
    *,
    masked: bool,
    head_chunks: int = 1,
    dtype: torch.dtype = torch.float32,
    kernel: Kernel | None = None,
    wrap: Callable[[Comm], Comm] = lambda comm: comm,
    damage_slice: Callable[[Batch, int], Batch] = lambda part, rank: part,
    make_ops: Callable[[Mesh], SequenceOps] | None = None,
    divisor: Callable[[Batch], float] | None = None,
) -> Outcome:
    """The same on in-process ranks, Ulysses or ``(ulysses_size, ring_size)``; the last three plant faults."""
    ulysses_size, ring_size = mesh if isinstance(mesh, tuple) else (mesh, 1)

    def rank(comm: Comm) -> Outcome:
        grid = build_mesh(wrap(comm), ulysses_size=ulysses_size, ring_size=ring_size)
        ops, layout = sequence_ops(kernel or SdpaKernel(), grid, head_chunks)
        if make_ops:
            ops = make_ops(grid)
        part = damage_slice(layout.slice(batch, comm.rank), comm.rank)
        num_valid = divisor(part) if divisor else batch.num_valid
        return run(model, part, ops, num_valid, masked=masked, dtype=dtype)

    outcomes = run_in_process(ulysses_size * ring_size, rank)
    names = {name for _, gradients in outcomes for name in gradients}
    zero = torch.zeros(())
    total = {name: sum((g.get(name, zero) for _, g in outcomes), zero) for name in names}
    return sum(nll for nll, _ in outcomes) / batch.num_valid, total


def differences(found: Outcome, reference: Outcome, bound: float = 1e-5) -> list[str]:
    """What breaks the bound of float32: ``|g - g_ref| <= 1e-5 * max(|g_ref|, 1e-3 * |all gradients|)``."""
    (loss, gradients), (expected_loss, expected) = found, reference
    wrong = [] if abs(loss - expected_loss) <= 0.1 * bound * abs(expected_loss) else ["loss"]
    wrong += sorted(gradients.keys() ^ expected.keys())
    everything = torch.stack([g.double().norm() for g in expected.values()]).norm()
    for name in gradients.keys() & expected.keys():
        allowed = bound * max(expected[name].double().norm(), 1e-3 * everything)
        # Not "> allowed", which a NaN would pass.
        if not (gradients[name].double() - expected[name].double()).norm() <= allowed:
            wrong.append(name)
    return wrong
