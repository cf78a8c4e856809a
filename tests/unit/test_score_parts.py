"""Attention in parts carries dual chunk attention: chunks as documents of masks, against its dense definition.

There is no such policy in the configuration (docs/model.md says why); this holds what one would stand on.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.config.rope import RopeConfig
from roformer_dist.kernels.attention import Kernel, ScorePart, SequenceOps
from roformer_dist.kernels.reference import ReferenceKernel
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.model.rotary import Rotary
from roformer_dist.parallel.comm import Comm
from roformer_dist.parallel.in_process import run_in_process
from roformer_dist.parallel.mesh import build_mesh
from roformer_dist.parallel.sequence_ops import sequence_ops, single_sequence_ops

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
CHUNK, TRAINED = 3, 5
LENGTHS = (1, 26, 3, 14)  # documents of 1, 9, 1 and 5 chunks
TOKENS = sum(LENGTHS)
ROTARY = Rotary(RopeConfig(theta=50.0), HEAD_DIM)

Range = tuple[int, int]


def mask_of(pairs: Sequence[tuple[Range, Range]]) -> MaskSpec:
    """Queries of each pair see its keys; pairs ascend, and tokens between them stand in documents of one side only."""
    q_ends, k_ends = [0], [0]
    for (q_start, q_stop), (k_start, k_stop) in [*pairs, ((TOKENS, TOKENS), (TOKENS, TOKENS))]:
        q_ends += [q_start, q_start, q_stop]
        k_ends += [k_ends[-1], k_start, k_stop]
    longest = [max(b - a for a, b in pairwise(ends)) for ends in (q_ends, k_ends)]
    cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32) for ends in (q_ends, k_ends))
    return MaskSpec(cu_q, cu_k, *longest, causal=False)


def region_masks() -> tuple[MaskSpec, MaskSpec, list[MaskSpec]]:
    """Keys of the query's chunk, of the one before, and of all before that.

    The last is a staircase: chunk i sees chunks j with j + 1 < i. The highest bit in which i and j + 1 differ is the
    level of the pair; at one level no ranges of keys overlap, so that a level is a mask, and there are log2 of them.
    """
    chunks, before = [], []
    levels: list[list[tuple[Range, Range]]] = [[] for _ in range(4)]
    for start, length in zip(accumulate(LENGTHS, initial=0), LENGTHS):
        cuts = [start + min(i * CHUNK, length) for i in range(-(-length // CHUNK) + 1)]
        count = len(cuts) - 1
        chunks += [b - a for a, b in pairwise(cuts)]
        before += [((cuts[i], cuts[i + 1]), (cuts[i - 1], cuts[i])) for i in range(1, count)]
        for level, pairs in enumerate(levels):
            half = 2**level
            for middle in range(half, count, 2 * half):
                first, last = max(middle - half - 1, 0), middle - 1
                if last > first:
                    queries = cuts[middle], cuts[min(middle + half, count)]
                    pairs.append((queries, (cuts[first], cuts[last])))
    return MaskSpec.from_lengths(chunks, causal=True), mask_of(before), [mask_of(pairs) for pairs in levels]


def turned(x: Tensor, positions: Tensor) -> Tensor:
    return ROTARY.phases(positions[None]).rotate(x)


def query_positions(within: Tensor) -> list[Tensor]:
    """Of a query, by its place in its chunk: for keys of its chunk, of the one before, and of all before that."""
    return [within, (within + CHUNK).clamp(max=TRAINED - 1), torch.full_like(within, TRAINED - 1)]


POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])
WITHIN = POSITIONS % CHUNK


def by_parts(ops: SequenceOps, q: Tensor, k: Tensor, v: Tensor, tokens: slice) -> Tensor:
    own, before, levels = region_masks()
    here, near, far = (turned(q, places[tokens]) for places in query_positions(WITHIN))
    keys = turned(k, WITHIN[tokens])
    parts = [ScorePart(here, keys, own), ScorePart(near, keys, before)]
    parts += [ScorePart(far, keys, mask) for mask in levels]
    return ops.attend_parts(parts, v, HEAD_DIM**-0.5)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """arXiv 2402.17463, section 3: scores of each region, chosen by how many chunks a key lies behind its query."""
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    behind = (POSITIONS // CHUNK)[:, None] - POSITIONS // CHUNK
    keys = turned(k, WITHIN).repeat_interleave(HEADS // KV_HEADS, dim=2)[0]
    scores = torch.stack(
        [torch.einsum("tnd,und->ntu", turned(q, places)[0], keys) for places in query_positions(WITHIN)]
    )
    chosen = scores.gather(0, behind.clamp(0, 2).expand(1, HEADS, TOKENS, TOKENS))[0] * HEAD_DIM**-0.5
    hidden = (document[:, None] != document) | (POSITIONS[:, None] < POSITIONS)
    weights = chosen.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("ntu,und->tnd", weights, v.repeat_interleave(HEADS // KV_HEADS, dim=2)[0])[None]


def draw(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, TOKENS, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    *leaves, dout = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    return leaves, dout


def expected() -> list[Tensor]:
    leaves, dout = draw(torch.float64)
    leaves = [x.requires_grad_() for x in leaves]
    out = dense(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("ulysses_size", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "dtype", "tolerance"),
    [
        (ReferenceKernel, torch.float32, 5e-6),
        (SdpaKernel, torch.float32, 5e-6),
        (SdpaKernel, torch.bfloat16, 3e-2),
    ],
    ids=["reference", "sdpa fp32", "sdpa bf16"],
)
def test_dual_chunk_attention_is_parts_under_one_softmax(
    kernel: type[Kernel], dtype: torch.dtype, tolerance: float, ulysses_size: int
) -> None:
    leaves, dout = draw(dtype)

    def rank(comm: Comm) -> list[Tensor]:
        ops = single_sequence_ops(kernel())
        if comm.size > 1:
            ops, _ = sequence_ops(kernel(), build_mesh(comm, ulysses_size=comm.size, ring_size=1))
        own = slice(comm.rank * TOKENS // comm.size, (comm.rank + 1) * TOKENS // comm.size)
        mine = [x[:, own].clone().requires_grad_() for x in leaves]
        out = by_parts(ops, *mine, tokens=own)
        return [out.detach(), *torch.autograd.grad(out, mine, dout[:, own])]

    found = [torch.cat(parts, dim=1) for parts in zip(*run_in_process(ulysses_size, rank))]
    for name, got, want in zip(("out", "dq", "dk", "dv"), found, expected(), strict=True):
        error = float((got.double() - want).abs().max() / want.abs().max())
        assert error <= tolerance, (name, error)


def test_every_key_of_a_query_is_in_one_region() -> None:
    own, before, levels = region_masks()
    seen = torch.zeros(TOKENS, TOKENS, dtype=torch.int64)
    for mask in (own, before, *levels):
        for q_start, q_len, k_start, k_len, offset in mask.documents:
            distance = (torch.arange(q_len) + offset)[:, None] - torch.arange(k_len)
            seen[q_start : q_start + q_len, k_start : k_start + k_len] += ~mask.hidden(distance)
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    assert torch.equal(seen.bool(), (document[:, None] == document) & (POSITIONS[:, None] >= POSITIONS))
    assert seen.max() == 1
