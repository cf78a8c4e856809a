"""The schemes of sequence parallelism on one card, by in-process ranks: numerics, and the kernel's time by hop.

Ranks of one process share the card, so they say nothing about a scheme's speed. What a mesh asks of the kernel is
noted instead, and its calls are timed one after another, alone, as one long call over the row is.

Shapes: T tokens of the row, S those of a rank, N query heads, M key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.bench.gpu import GpuJob
from roformer_dist.bench.gpu_timing import DTYPE, median_seconds
from roformer_dist.kernels.attention import Kernel, choose_kernel
from roformer_dist.parallel.comm import Comm
from roformer_dist.parallel.in_process import run_in_process
from roformer_dist.parallel.mesh import build_mesh
from roformer_dist.parallel.sequence_ops import sequence_ops, single_sequence_ops

TENSORS = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Call:
    """One call of the kernel: its mask, and the shapes of q and k."""

    mask: MaskSpec
    queries: torch.Size
    keys: torch.Size

    @property
    def pairs(self) -> int:
        """Visible pairs of query and key, over all heads; for masks without a window."""
        seen = 0
        for _, queries, _, keys, offset in self.mask.documents:
            last = np.arange(queries) + offset + 1 if self.mask.causal else np.full(queries, keys)
            seen += int(np.clip(last, 0, keys).sum())
        return seen * self.queries[1]


class NotingKernel:
    """A kernel that notes its forward calls."""

    def __init__(self, kernel: Kernel) -> None:
        self.name = kernel.name
        self.calls: list[Call] = []
        self._kernel = kernel
        self.backward = kernel.backward

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        self.calls.append(Call(mask, q.shape, k.shape))
        return self._kernel.forward(q, k, v, mask, softmax_scale)


def spread(job: GpuJob, device: torch.device) -> tuple[float, dict[str, Any]]:
    """Seconds of all kernel calls of all ranks, forward and backward, and what else the sample reports.

    ``errors``: for out and each gradient, the norm of the difference from one call, over its norm.
    ``hop_efficiency``: ``[forward, backward]``, for each hop the kernel's rate in it over that of one call,
    all ranks together; ``efficiency``: of all hops, forward and backward.
    """
    model, tokens = job.model, job.tokens
    generator = torch.Generator(device).manual_seed(0)
    heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads, model.num_heads)
    q, k, v, dout = (
        torch.randn(1, tokens, n, model.head_dim, device=device, dtype=DTYPE, generator=generator)
        for n in heads
    )
    mask = MaskSpec.from_lengths([tokens], causal=True).to(device)
    scale = model.head_dim**-0.5
    with torch.no_grad():
        kernel, _ = choose_kernel("auto", device, DTYPE)
        alone = single_sequence_ops(kernel)
        out, saved = alone.scheme.forward(kernel, q, k, v, mask, scale)
        expected = (out, *alone.scheme.backward(kernel, dout, saved, mask, scale))
        del saved
        found, calls = _by_ranks(job, (q, k, v, dout), mask, scale)
        errors = {
            name: float((x.float() - y.float()).norm() / y.float().norm())
            for name, x, y in zip(TENSORS, found, expected, strict=True)
        }
        del out, found, expected
        flat = tuple(x[0] for x in (q, k, v, dout))
        whole = Call(mask, flat[0].shape, flat[1].shape)
        one_call = _timed([[whole]], flat, scale, job.steps, device)[0]
        by_hop = _timed(list(zip(*calls, strict=True)), flat, scale, job.steps, device)
    work = [sum(call.pairs for call in hop) / whole.pairs for hop in zip(*calls, strict=True)]
    hops = [[share * one_call[way] / seconds[way] for share, seconds in zip(work, by_hop)] for way in (0, 1)]
    seconds = sum(map(sum, by_hop))
    said = {
        "errors": errors,
        "hop_efficiency": hops,
        "hop_share_of_work": work,
        "efficiency": sum(one_call) / seconds,
        "one_call_seconds": one_call,
    }
    return seconds, said


def _by_ranks(
    job: GpuJob, tensors: Sequence[Tensor], mask: MaskSpec, scale: float
) -> tuple[list[Tensor], list[list[Call]]]:
    """out, dq, dk, dv of the whole row as the ranks of the mesh compute them, and each rank's calls."""

    def rank(comm: Comm) -> tuple[Tensor, list[Tensor], list[Call]]:
        mesh = build_mesh(comm, ulysses_size=job.ulysses_size, ring_size=job.ring_size)
        # A kernel of its own: what one remembers of its masks is not safe from other threads.
        kernel = NotingKernel(choose_kernel("auto", tensors[0].device, DTYPE)[0])
        ops, layout = sequence_ops(kernel, mesh)
        places = layout.indices(mask, 1, comm.rank)[0].to(tensors[0].device)
        with torch.no_grad():
            q, k, v, dout = (x.index_select(1, places) for x in tensors)
            out, saved = ops.scheme.forward(kernel, q, k, v, mask, scale)
            grads = ops.scheme.backward(kernel, dout, saved, mask, scale)
        return places, [out, *grads], kernel.calls

    parts = run_in_process(job.ulysses_size * job.ring_size, rank)
    q, k, v, _ = tensors
    whole = [torch.zeros_like(x) for x in (q, q, k, v)]
    for places, own, _ in parts:
        for target, part in zip(whole, own, strict=True):
            target.index_copy_(1, places, part)
    return whole, [calls for *_, calls in parts]


def _timed(
    hops: Sequence[Sequence[Call]], flat: Sequence[Tensor], scale: float, steps: int, device: torch.device
) -> list[tuple[float, float]]:
    """For each hop, the seconds of its calls, forward and backward."""
    kernel, _ = choose_kernel("auto", device, DTYPE)
    seconds = []
    for hop in hops:
        forward, backward = zip(*(_call_seconds(kernel, call, flat, scale, steps, device) for call in hop))
        seconds.append((sum(forward), sum(backward)))
    return seconds


def _call_seconds(
    kernel: Kernel, call: Call, flat: Sequence[Tensor], scale: float, steps: int, device: torch.device
) -> tuple[float, float]:
    """Forward and backward on tokens of the row as many as the call has; which they are changes no time."""
    (num_q, n, _), (num_k, m, _) = call.queries, call.keys
    q, dout = (x[:num_q, :n].contiguous() for x in (flat[0], flat[3]))
    k, v = (x[:num_k, :m].contiguous() for x in (flat[1], flat[2]))
    out, lse = kernel.forward(q, k, v, call.mask, scale)
    forward = median_seconds(lambda: kernel.forward(q, k, v, call.mask, scale), steps, device)
    backward = median_seconds(
        lambda: kernel.backward(dout, q, k, v, out, lse, call.mask, scale), steps, device
    )
    return forward, backward
