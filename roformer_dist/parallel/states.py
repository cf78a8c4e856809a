"""Linear attention of a sequence that ranks share: the states of their pieces travel, never keys.

A rank holds pieces of documents, runs of neighbouring tokens. Of a document that several pieces share,
each piece needs one state: the sum over those before it (over all others, attending both ways). One
gather brings the states of everyone's pieces; backward, another brings what their queries say of the
states. Nothing depends on how the layout cuts a document.

Shapes: R rows, S this rank's tokens, N query heads, M key/value heads, D head_dim, P ranks, Z slots for
states of one rank, n shared pieces of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels.linear import (
    LinearState,
    Streams,
    document_backward,
    document_forward,
    empty_state,
    key_state,
    query_state,
    sum_gradients,
)
from roformer_dist.parallel.comm import Comm
from roformer_dist.parallel.layout import Layout, PlanKey


@dataclass(frozen=True)
class Piece:
    """A run of one document's tokens on this rank.

    Attributes:
        tokens: where they are in the rank's flattened rows.
        slot: where its state stands among the rank's; None: it is the whole document.
        before, after: places among the slots of all ranks, ``rank * Z + slot``, of the pieces whose keys its
            queries see, and of those whose queries see its keys.
    """

    tokens: slice
    slot: int | None
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class StatePlan:
    """This rank's ``pieces``, and how many ``slots`` for states each rank sends."""

    pieces: tuple[Piece, ...]
    slots: int


def plan_states(layout: Layout, mask: MaskSpec, rows: int, rank: int) -> StatePlan:
    """PURE: what ``rank`` computes and which states it reads; ``mask`` is that of the padded micro-batch."""
    assert mask.window is mask.min_distance is None, "linear attention has no window"
    held = [_runs(places, mask, rows) for places in layout.all_indices(mask, rows)]
    runs = [
        (document, start, r, i)
        for r, theirs in enumerate(held)
        for i, (document, start, _) in enumerate(theirs)
    ]
    shared = [
        found for _, each in groupby(sorted(runs), key=lambda run: run[0]) if len(found := list(each)) > 1
    ]
    slot_of: dict[tuple[int, int], int] = {}
    counts = [0] * len(held)
    for document in shared:
        for _, _, r, i in document:
            slot_of[r, i] = counts[r]
            counts[r] += 1
    slots = max(counts)
    pieces = [Piece(tokens, slot_of.get((rank, i)), (), ()) for i, (_, _, tokens) in enumerate(held[rank])]
    for document in shared:
        places = [r * slots + slot_of[r, i] for _, _, r, i in document]
        for turn, (_, _, r, i) in enumerate(document):
            if r == rank:
                earlier, later = tuple(places[:turn]), tuple(places[turn + 1 :])
                others = (earlier, later) if mask.causal else (earlier + later, earlier + later)
                pieces[i] = Piece(pieces[i].tokens, slot_of[r, i], *others)
    return StatePlan(tuple(pieces), slots)


def _runs(places: Tensor, mask: MaskSpec, rows: int) -> list[tuple[int, int, slice]]:
    """``(document, first place, tokens)`` of each run of neighbours in one rank's ``places`` ``[R, S]``."""
    starts = mask.cu_seqlens_q.cpu().numpy().astype(np.int64)
    flat = (places.cpu().numpy() + np.arange(rows)[:, None] * (starts[-1] // rows)).reshape(-1)
    document = np.searchsorted(starts, flat, side="right") - 1
    cuts = np.flatnonzero((np.diff(flat) != 1) | (np.diff(document) != 0)) + 1
    first, last = np.append(0, cuts), np.append(cuts, len(flat))
    return [(int(document[a]), int(flat[a]), slice(int(a), int(b))) for a, b in zip(first, last) if a < b]


class SharedStates:
    """Linear attention of one rank.

    Args:
        comm: all ranks of a sequence.
        layout: how its tokens are spread over them.
    """

    def __init__(self, comm: Comm, layout: Layout) -> None:
        self.comm = comm
        self.layout = layout
        # A micro-batch's plan serves all its layers, forward and backward.
        self._plans = lru_cache(maxsize=8)(self._plan)

    def forward(self, streams: Streams, mask: MaskSpec, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """``(out [R * S, N, D], denominator [R * S, N], states before the shared pieces [n, M, D, D + 1])``.

        ``streams`` are flattened over the rank's rows; ``mask`` is that of the whole micro-batch.
        """
        plan = self._plans(PlanKey(mask, rows))
        everyone = self._gather(plan, streams, lambda piece: key_state(streams.cut(piece.tokens)))
        out = torch.empty_like(streams.q, memory_format=torch.contiguous_format)
        denominator = everyone.new_empty(streams.q.shape[:2])
        shared = [piece for piece in plan.pieces if piece.slot is not None]
        before = everyone.new_empty((len(shared), *everyone.shape[1:]))
        for piece in shared:
            before[piece.slot] = everyone[list(piece.before)].sum(0)
        for piece in plan.pieces:
            part, state = streams.cut(piece.tokens), _at(before, piece.slot)
            numerator, sums = document_forward(part, state, causal=mask.causal)
            out[piece.tokens] = numerator / sums[..., None]
            denominator[piece.tokens] = sums
        return out, denominator, before

    def backward(
        self,
        dout: Tensor,
        streams: Streams,
        out: Tensor,
        denominator: Tensor,
        before: Tensor,
        mask: MaskSpec,
        rows: int,
    ) -> Streams:
        """Gradients of ``streams`` from what ``forward`` returned."""
        plan = self._plans(PlanKey(mask, rows))
        d_numerator, d_denominator = sum_gradients(dout, out, denominator)

        def state(piece: Piece) -> LinearState:
            tokens = piece.tokens
            return query_state(streams.cut(tokens), d_numerator[tokens], d_denominator[tokens])

        everyone = self._gather(plan, streams, state)
        grads = Streams(*(torch.empty_like(x, memory_format=torch.contiguous_format) for x in streams))
        for piece in plan.pieces:
            parts = document_backward(
                streams.cut(piece.tokens),
                d_numerator[piece.tokens],
                d_denominator[piece.tokens],
                _at(before, piece.slot),
                _unpacked(everyone[list(piece.after)].sum(0)),
                causal=mask.causal,
            )
            for grad, part in zip(grads, parts):
                grad[piece.tokens] = part
        return grads

    def _plan(self, key: PlanKey) -> StatePlan:
        return plan_states(self.layout, key.mask, key.rows, self.comm.rank)

    def _gather(self, plan: StatePlan, streams: Streams, state: Callable[[Piece], LinearState]) -> Tensor:
        """The states of all ranks' shared pieces, ``[P * Z, M, D, D + 1]``."""
        nothing = _packed(empty_state(streams))
        own = nothing.new_zeros((plan.slots, *nothing.shape))
        if not plan.slots:  # no document is shared
            return own
        for piece in plan.pieces:
            if piece.slot is not None:
                own[piece.slot] = _packed(state(piece))
        return self.comm.all_gather(own).flatten(0, 1)


def _packed(state: LinearState) -> Tensor:
    """``[M, D, D + 1]``, one tensor to send."""
    return torch.cat([state.kv, state.k[..., None]], -1)


def _at(packed: Tensor, slot: int | None) -> LinearState:
    return _unpacked(packed.new_zeros(packed.shape[1:]) if slot is None else packed[slot])


def _unpacked(packed: Tensor) -> LinearState:
    return LinearState(packed[..., :-1], packed[..., -1])
