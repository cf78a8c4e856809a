"""The reference kernel: dense, float64, one document at a time. What every other kernel is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from roformer_dist.batch import MaskSpec


class ReferenceKernel:
    """Attention by its definition; memory grows with the square of the longest document."""

    name = "reference"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        out = torch.zeros_like(q)
        # float32 by contract; float64 inputs keep float64, so that the tests' reference is exact.
        lse_dtype = torch.promote_types(q.dtype, torch.float32)
        lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=lse_dtype, device=q.device)
        for document in mask.documents:
            rows, columns, hidden = _slices(document, mask, q.device)
            scores = _scores(q[rows], k[columns], hidden, softmax_scale)
            document_lse = scores.logsumexp(-1)
            probabilities = _probabilities(scores, document_lse)
            values = _expand(v[columns], q.shape[1])
            out[rows] = torch.einsum("ntu,und->tnd", probabilities, values).to(out.dtype)
            lse[:, rows] = document_lse.to(lse.dtype)
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: MaskSpec,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernel."""
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        num_heads, num_kv_heads = q.shape[1], k.shape[1]
        for document in mask.documents:
            rows, columns, hidden = _slices(document, mask, q.device)
            scores = _scores(q[rows], k[columns], hidden, softmax_scale)
            probabilities = _probabilities(scores, lse[:, rows].double())
            keys, values = _expand(k[columns], num_heads), _expand(v[columns], num_heads)
            dout_d, out_d = dout[rows].double(), out[rows].double()
            # d(scores) = P * (dP - rowsum(dO * O)): the row sum needs the global output.
            dp = torch.einsum("tnd,und->ntu", dout_d, values)
            ds = probabilities * (dp - (dout_d * out_d).sum(-1).T[..., None]) * softmax_scale
            dq[rows] = torch.einsum("ntu,und->tnd", ds, keys).to(dq.dtype)
            dk_full = torch.einsum("ntu,tnd->und", ds, q[rows].double())
            dv_full = torch.einsum("ntu,tnd->und", probabilities, dout_d)
            dk[columns] = _reduce(dk_full, num_kv_heads).to(dk.dtype)
            dv[columns] = _reduce(dv_full, num_kv_heads).to(dv.dtype)
        return dq, dk, dv


def _slices(
    document: tuple[int, int, int, int, int], mask: MaskSpec, device: torch.device
) -> tuple[slice, slice, Tensor]:
    q_start, q_len, k_start, k_len, offset = document
    # How far each key lies before its query.
    distance = (torch.arange(q_len, device=device) + offset)[:, None] - torch.arange(k_len, device=device)
    return slice(q_start, q_start + q_len), slice(k_start, k_start + k_len), mask.hidden(distance)


def _expand(x: Tensor, num_heads: int) -> Tensor:
    return x.double().repeat_interleave(num_heads // x.shape[1], dim=1)


def _reduce(x: Tensor, num_kv_heads: int) -> Tensor:
    return x.unflatten(1, (num_kv_heads, -1)).sum(2)


def _scores(q: Tensor, k: Tensor, hidden: Tensor, softmax_scale: float) -> Tensor:
    scores = torch.einsum("tnd,und->ntu", q.double(), _expand(k, q.shape[1])) * softmax_scale
    return scores.masked_fill(hidden, -torch.inf)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    # A query without keys has lse = -inf; exp(-inf - -inf) would be NaN.
    return (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
