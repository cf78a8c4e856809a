"""Attention with a bias on the scores that is a function of distance, in tiles, forward and backward.

Flash kernels take a bias as a dense tensor and give it no gradient. Here a tile of scores exists at a
time; memory beside the inputs is that tile, whatever the length. Plain PyTorch: runs on every device.

Shapes: tokens are flattened rows; T queries and U keys of a tile, N query heads, M key/value heads, G = N / M,
D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels.attention import ScoreBias

# Scores of all heads in one tile: 16 MiB in float32.
TILE_SCORES = 2**22


def biased_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float, bias: ScoreBias
) -> tuple[Tensor, Tensor]:
    """``(out [tokens_q, N, D], lse [N, tokens_q])``; positions of ``bias`` are flattened like the tokens."""
    work = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=work, device=q.device)
    with torch.no_grad():
        for rows, columns, hidden in _tiles(mask, q):
            term = bias.function(bias.values, _distance(bias, rows, columns))
            scores = _scores(q[rows], k[columns], softmax_scale).add_(term).masked_fill_(hidden, -torch.inf)
            lse[:, rows] = scores.logsumexp(-1)
            out[rows] = _weighted(_probabilities(scores, lse[:, rows]), v[columns]).to(out.dtype)
    return out, lse


def biased_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: MaskSpec,
    softmax_scale: float,
    bias: ScoreBias,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``(dq, dk, dv, dvalues)`` from the *global* ``out`` and ``lse``; dvalues is None if nobody asks for it."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
    wants_values = bias.values.requires_grad
    values = bias.values.detach().requires_grad_(wants_values)
    dvalues = torch.zeros_like(values, dtype=torch.promote_types(values.dtype, torch.float32))
    kv_heads = k.shape[1]
    for rows, columns, hidden in _tiles(mask, q):
        with torch.set_grad_enabled(wants_values):
            term = bias.function(values, _distance(bias, rows, columns))
        scores = _scores(q[rows], k[columns], softmax_scale).add_(term.detach())
        probabilities = _probabilities(scores.masked_fill_(hidden, -torch.inf), lse[:, rows])
        dout_tile = dout[rows].to(lse.dtype)
        delta = (dout_tile * out[rows]).sum(-1).T[..., None]
        ds = probabilities * (_scores(dout_tile, v[columns], 1.0) - delta)
        if wants_values:
            (part,) = torch.autograd.grad(term, values, ds.to(term.dtype))
            dvalues += part
        dv[columns] += _reduced(probabilities, dout_tile, kv_heads)
        ds.mul_(softmax_scale)
        dq[rows] += _weighted(ds, k[columns])
        dk[columns] += _reduced(ds, q[rows].to(lse.dtype), kv_heads)
    grads = dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
    return *grads, dvalues.to(values.dtype) if wants_values else None


def _tiles(mask: MaskSpec, q: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Runs of queries with every key they may see, and which of the pairs are hidden."""
    nearest, farthest = mask.distances
    for q_start, q_len, k_start, k_len, offset in mask.documents:
        widest = k_len if farthest is None else min(k_len, 2 * farthest + 1)
        step = max(1, TILE_SCORES // (q.shape[1] * max(widest, 1)))
        if farthest is not None:  # a run longer than the window would see mostly what is hidden
            step = min(step, max(farthest, 64))
        for start in range(0, q_len, step):
            stop = min(start + step, q_len)
            low = 0 if farthest is None else max(0, start + offset - farthest)
            high = k_len if nearest is None else min(k_len, stop + offset - nearest)
            if low >= high:
                continue
            queries = torch.arange(start + offset, stop + offset, device=q.device)
            hidden = mask.hidden(queries[:, None] - torch.arange(low, high, device=q.device))
            yield slice(q_start + start, q_start + stop), slice(k_start + low, k_start + high), hidden


def _distance(bias: ScoreBias, rows: slice, columns: slice) -> Tensor:
    return bias.q_positions[rows, None] - bias.k_positions[columns]


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """``[N, T, U]`` products of q ``[T, N, D]`` and k ``[U, M, D]`` in float32."""
    work = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(work).unflatten(1, (k.shape[1], -1)) * scale
    return torch.einsum("tmgd,umd->mgtu", grouped, k.to(work)).flatten(0, 1)


def _weighted(weights: Tensor, x: Tensor) -> Tensor:
    """``[T, N, D]`` sums over keys of x ``[U, M, D]`` with weights ``[N, T, U]``."""
    grouped = weights.unflatten(0, (x.shape[1], -1))
    return torch.einsum("mgtu,umd->tmgd", grouped, x.to(weights.dtype)).flatten(1, 2)


def _reduced(weights: Tensor, x: Tensor, kv_heads: int) -> Tensor:
    """``[U, M, D]`` sums over queries of x ``[T, N, D]`` with weights ``[N, T, U]``, over heads of a group too."""
    grouped = weights.unflatten(0, (kv_heads, -1))
    return torch.einsum("mgtu,tmgd->umd", grouped, x.unflatten(1, (kv_heads, -1)))


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    # A query without keys has lse = -inf; exp(-inf - -inf) would be NaN.
    return (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp_()
