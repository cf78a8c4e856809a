"""Ring: queries stay, keys and values come from every other rank, one after the other.

Source: Liu et al., arXiv 2310.01889; the zigzag order is the layout's. Every message goes straight from
the rank that owns the keys, and their gradients come straight back in float32: no block is handed on
from rank to rank, so none can be stale, and only what is seen is sent (see hops.py).

Shapes: R rows, S this rank's tokens, N query heads, M key/value heads, D head_dim, K tokens of a message.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels.attention import Kernel
from roformer_dist.parallel.attention import Saved
from roformer_dist.parallel.comm import Comm, Pending
from roformer_dist.parallel.hops import Hop, plan_hops
from roformer_dist.parallel.layout import PlanKey, row_lengths
from roformer_dist.parallel.zigzag import deal


class RingScheme:
    """Attention hop by hop; the next message is under way while this one is computed with.

    ``out`` and ``lse`` are merged in float32, and the backward calls the kernel once a hop with the
    merged ones, so that its parts add up: dq here in float32, dk and dv in float32 where they belong.
    """

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        # A micro-batch's plan serves all its layers, forward and backward.
        self._plans = lru_cache(maxsize=8)(self._plan)

    def forward(
        self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float
    ) -> tuple[Tensor, Saved]:
        """See Scheme."""
        rows = q.shape[:2]
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        sum_dtype = torch.promote_types(q.dtype, torch.float32)
        total = torch.zeros(q.shape, dtype=sum_dtype, device=q.device)
        lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=sum_dtype, device=q.device)
        for hop, keys, values in self._visits(mask, rows[0], k, v):
            for call in hop.calls:
                k_part, v_part = _pick(keys, call.keys), _pick(values, call.keys)
                part = kernel.forward(_pick(q, call.queries), k_part, v_part, call.mask, softmax_scale)
                _merge(total, lse, *part, call.queries)
        out = total.to(q.dtype)
        return out.unflatten(0, rows), (q, k, v, out, lse)

    def backward(
        self, kernel: Kernel, dout: Tensor, saved: Saved, mask: MaskSpec, softmax_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Scheme."""
        rows = dout.shape[:2]
        dout = dout.flatten(0, 1)
        q, k, v, out, lse = saved
        dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=q.device) for x in (q, k, v))
        returning: tuple[Hop, Pending] | None = None
        for hop, keys, values in self._visits(mask, rows[0], k, v):
            own = hop.source == self.comm.rank
            partial = None if own else dk.new_zeros((2, *keys.shape))
            dk_hop, dv_hop = (dk, dv) if partial is None else partial
            for call in hop.calls:
                dq_part, dk_part, dv_part = kernel.backward(
                    _pick(dout, call.queries),
                    _pick(q, call.queries),
                    _pick(keys, call.keys),
                    _pick(values, call.keys),
                    _pick(out, call.queries),
                    lse if call.queries is None else lse[:, call.queries],
                    call.mask,
                    softmax_scale,
                )
                _add(dq, dq_part, call.queries)
                _add(dk_hop, dk_part, call.keys)
                _add(dv_hop, dv_part, call.keys)
            # What the hop before brought home was under way while this one was computed.
            self._collect(dk, dv, returning)
            returning = None if partial is None else (hop, self._send_home(hop, partial))
        self._collect(dk, dv, returning)
        dq, dk, dv = (x.to(q.dtype).unflatten(0, rows) for x in (dq, dk, dv))
        return dq, dk, dv

    def _visits(
        self, mask: MaskSpec, rows: int, k: Tensor, v: Tensor
    ) -> Iterator[tuple[Hop, Tensor, Tensor]]:
        """Each hop with the keys and values it computes with, when they have come; the next are posted before."""
        hops = self._plans(PlanKey(mask, rows))
        arrived = (k, v)
        for number, hop in enumerate(hops):
            coming = self._send_keys(hops[number + 1], k, v) if number + 1 < len(hops) else None
            yield hop, *arrived
            if coming:
                keys, values = coming.wait().unbind(0)
                arrived = (keys, values)

    def _plan(self, key: PlanKey) -> list[Hop]:
        holdings = deal(row_lengths(key.mask, key.rows), self.comm.size)
        return plan_hops(holdings, self.comm.rank, key.mask)

    def _send_keys(self, hop: Hop, k: Tensor, v: Tensor) -> Pending:
        """Post the messages of a hop: what another rank needs of ours, and what comes."""
        message = k.new_empty((2, hop.num_sent, *k.shape[1:]))
        for part, x in zip(message, (k, v)):
            if hop.sent is None:
                part.copy_(x)
            else:
                torch.index_select(x, 0, hop.sent, out=part)
        shape = (2, hop.num_received, *k.shape[1:])
        return self.comm.exchange(message, to=hop.to, source=hop.source, shape=shape)

    def _send_home(self, hop: Hop, partial: Tensor) -> Pending:
        """Post the gradients of the keys that came, and receive those of the keys that were sent."""
        shape = (2, hop.num_sent, *partial.shape[2:])
        return self.comm.exchange(partial, to=hop.source, source=hop.to, shape=shape)

    def _collect(self, dk: Tensor, dv: Tensor, returning: tuple[Hop, Pending] | None) -> None:
        if returning:
            hop, message = returning
            dk_part, dv_part = message.wait().unbind(0)
            _add(dk, dk_part, hop.sent)
            _add(dv, dv_part, hop.sent)


def _pick(x: Tensor, places: Tensor | None) -> Tensor:
    return x if places is None else x.index_select(0, places)


def _add(target: Tensor, part: Tensor, places: Tensor | None) -> None:
    if places is None:
        target.add_(part)
    else:
        target.index_add_(0, places, part.to(target.dtype))


def _merge(total: Tensor, lse: Tensor, out_part: Tensor, lse_part: Tensor, places: Tensor | None) -> None:
    """Fold a part's output into the running one: weights are shares of the common normaliser."""
    lse_before = lse if places is None else lse[:, places]
    merged = torch.logaddexp(lse_before, lse_part)
    # Where no key was seen yet, neither part has any weight; exp(-inf - -inf) would be NaN.
    base = merged.masked_fill(merged == -torch.inf, 0)
    weight_before, weight_part = ((x - base).exp().T[..., None] for x in (lse_before, lse_part))
    if places is None:
        total.mul_(weight_before).add_(out_part * weight_part)
        lse.copy_(merged)
    else:
        share = total.index_select(0, places).mul_(weight_before).add_(out_part * weight_part)
        total.index_copy_(0, places, share)
        lse.index_copy_(1, places, merged)
