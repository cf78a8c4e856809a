"""A ring in bf16 rounds once, at its end: out, dq, dk and dv are summed over hops, and travel home, in float32.

So are the gradients of a key/value head that several ranks of an all-to-all attend with.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels.reference import ReferenceKernel
from roformer_dist.parallel.comm import Comm
from roformer_dist.parallel.in_process import run_in_process
from roformer_dist.parallel.layout import ZigzagLayout
from roformer_dist.parallel.ring import RingScheme
from roformer_dist.parallel.ulysses import UlyssesScheme

RANKS, TOKENS, HEADS, KV_HEADS, HEAD_DIM, SCALE = 12, 12 * 16, 4, 2, 16, 0.25
MASKS = {
    "whole, both ways": ([TOKENS], False, None),
    "causal documents": ([100, 1, 60, 31], True, None),
    "a window": ([150, 42], True, 70),
}
# Numbers that lie nearer to the middle between two of bf16 than float32 tells apart may go either way.
ALIKE = 0.99


class Float32Kernel(ReferenceKernel):
    """Rounds nothing to bf16, so that whatever is rounded was rounded by the ring."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(q.double(), k.double(), v.double(), *rest)
        return out.float(), lse.float()

    def backward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, mask, scale = arguments
        dq, dk, dv = super().backward(*(x.double() for x in tensors), mask, scale)
        return dq.float(), dk.float(), dv.float()


@pytest.mark.parametrize("name", MASKS)
def test_sums_over_hops_are_rounded_to_bf16_once(name: str) -> None:
    lengths, causal, window = MASKS[name]
    mask = MaskSpec.from_lengths(lengths, causal=causal, window=window)
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, TOKENS, heads, HEAD_DIM, generator=generator).bfloat16()
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    layout = ZigzagLayout(RANKS)

    def rank(comm: Comm) -> list[Tensor]:
        places = layout.indices(mask, 1, comm.rank)[0]
        scheme, kernel = RingScheme(comm), Float32Kernel()
        out, saved = scheme.forward(kernel, *(x[:, places] for x in (q, k, v)), mask, SCALE)
        assert saved[-1].dtype == torch.float32, "lse"
        return [out, *scheme.backward(kernel, dout[:, places], saved, mask, SCALE)]

    found = [torch.cat(parts, dim=1)[0] for parts in zip(*run_in_process(RANKS, rank))]
    order = torch.cat([layout.indices(mask, 1, number)[0] for number in range(RANKS)])

    exact = ReferenceKernel()
    tensors = [x[0].double() for x in (dout, q, k, v)]
    out, lse = exact.forward(*tensors[1:], mask, SCALE)
    # What is kept for the backward is the rounded out.
    grads = exact.backward(*tensors, out.bfloat16().double(), lse, mask, SCALE)
    for what, ours, theirs in zip(("out", "dq", "dk", "dv"), found, (out, *grads)):
        assert ours.dtype == torch.bfloat16
        alike = (ours == theirs[order].bfloat16()).double().mean()
        assert alike >= ALIKE, f"{what}: {alike:.1%} of the numbers are the exact ones, rounded once"


def test_gradients_of_replicated_keys_are_rounded_to_bf16_once() -> None:
    ranks, tokens = 8, 64
    mask = MaskSpec.from_lengths([40, 24], causal=True)
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, tokens, heads, HEAD_DIM, generator=generator).bfloat16()
        for heads in (ranks, 1, 1, ranks)
    )

    def rank(comm: Comm) -> list[Tensor]:
        q_part, k_part, v_part, dout_part = (x.chunk(ranks, dim=1)[comm.rank] for x in (q, k, v, dout))
        scheme, kernel = UlyssesScheme(comm), ReferenceKernel()
        _, saved = scheme.forward(kernel, q_part, k_part, v_part, mask, SCALE)
        return list(scheme.backward(kernel, dout_part, saved, mask, SCALE)[1:])

    found = [torch.cat(parts, dim=1)[0] for parts in zip(*run_in_process(ranks, rank))]
    sums = [torch.zeros(tokens, 1, HEAD_DIM) for _ in range(2)]
    for head in range(ranks):  # each rank's part, as its kernel rounds it
        one = q[0, :, head : head + 1], k[0], v[0]
        out, lse = ReferenceKernel().forward(*one, mask, SCALE)
        parts = ReferenceKernel().backward(dout[0, :, head : head + 1], *one, out, lse, mask, SCALE)[1:]
        for total, part in zip(sums, parts):
            total += part
    for what, ours, theirs in zip(("dk", "dv"), found, sums):
        assert ours.dtype == torch.bfloat16
        assert (ours == theirs.bfloat16()).double().mean() >= ALIKE, what
