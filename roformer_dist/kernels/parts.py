"""Several rotations of the same queries and keys under one softmax: a kernel's calls merged by lse.

ReRoPE and SelfExtend rotate near and far keys differently. Each region is a plain call of the kernel; the merged
out and lse make the backward of each exact (see Kernel). A region is any mask: bands of distances, or chunks as
documents (docs/model.md on dual chunk attention).

Shapes: tokens are flattened rows; N query heads, M key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels.attention import Kernel

# (q [tokens_q, N, D], k [tokens_k, M, D], mask) of one region.
FlatPart = tuple[Tensor, Tensor, MaskSpec]


def parts_forward(
    kernel: Kernel, parts: Sequence[FlatPart], v: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """``(out [tokens_q, N, D], lse [N, tokens_q])`` over the keys of all ``parts``, merged in float32."""
    results = (kernel.forward(q, k, v, mask, softmax_scale) for q, k, mask in parts)
    out, lse = next(results)
    total = out.to(lse.dtype)
    for part_out, part_lse in results:
        total, lse = merge(total, lse, part_out, part_lse)
    return total.to(v.dtype), lse


def parts_backward(
    kernel: Kernel,
    dout: Tensor,
    parts: Sequence[FlatPart],
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """``([(dq, dk) of each part], dv)`` from the merged ``out`` and ``lse``."""
    pairs = []
    dv = torch.zeros(v.shape, dtype=lse.dtype, device=v.device)
    for q, k, mask in parts:
        dq, dk, dv_part = kernel.backward(dout, q, k, v, out, lse, mask, softmax_scale)
        pairs.append((dq, dk))
        dv += dv_part
    return pairs, dv.to(v.dtype)


def merge(total: Tensor, lse: Tensor, out: Tensor, out_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two results over disjoint keys as one: ``total`` float32 ``[tokens, N, D]``, ``lse`` ``[N, tokens]``.

    A query that saw no key on one side (lse ``-inf``) keeps the other side; on both, output 0.
    """
    merged = torch.logaddexp(lse, out_lse)
    # exp(-inf - -inf) would be NaN.
    reference = merged.masked_fill(merged == -torch.inf, 0)
    kept, added = ((part - reference).exp().T[..., None] for part in (lse, out_lse))
    return total * kept + out * added, merged
