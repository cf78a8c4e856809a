"""Hops and heads: together they cover exactly what the mask shows, and no more is sent than is seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from roformer_dist.batch import MaskSpec
from roformer_dist.parallel.heads import spread_heads
from roformer_dist.parallel.hops import plan_hops
from roformer_dist.parallel.layout import ZigzagLayout, row_lengths
from roformer_dist.parallel.zigzag import deal


def visible(mask: MaskSpec) -> torch.Tensor:
    """``[tokens_q, tokens_k]``, by definition."""
    seen = torch.zeros(int(mask.cu_seqlens_q[-1]), int(mask.cu_seqlens_k[-1]), dtype=torch.int64)
    for q_start, q_len, k_start, k_len, offset in mask.documents:
        distance = (torch.arange(q_len) + offset)[:, None] - torch.arange(k_len)
        seen[q_start : q_start + q_len, k_start : k_start + k_len] = (~mask.hidden(distance)).long()
    return seen


@settings(max_examples=120, deadline=None)
@given(
    row=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    size=st.integers(2, 6),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 2, 5, 11, 40]),
)
@example(row=[1, 2], size=2, causal=True, window=None)  # ranks whose back piece is empty
@example(row=[1, 3, 4, 5], size=3, causal=True, window=2)
def test_the_calls_of_all_hops_are_the_mask_each_pair_once(
    row: list[int], size: int, causal: bool, window: int | None
) -> None:
    row = [*row, -sum(row) % size]
    whole = MaskSpec.from_lengths(row, causal=causal, window=window)
    holdings = deal([np.array(row)], size)
    starts = np.cumsum(row) - row
    held = [torch.from_numpy(holding.places(starts)) for holding in holdings]
    plans = [plan_hops(holdings, rank, whole) for rank in range(size)]
    found = torch.zeros(sum(row), sum(row), dtype=torch.int64)
    for rank, hops in enumerate(plans):
        for distance, hop in enumerate(hops):
            sender = plans[hop.source][distance]
            assert sender.to == rank
            assert sender.num_sent == hop.num_received
            keys = held[hop.source] if sender.sent is None else held[hop.source][sender.sent]
            assert len(keys) == hop.num_received
            used = torch.zeros(len(keys), dtype=torch.bool)
            for call in hop.calls:
                q = held[rank] if call.queries is None else held[rank][call.queries]
                k = keys if call.keys is None else keys[call.keys]
                used[slice(None) if call.keys is None else call.keys] = True
                found[q[:, None], k] += visible(call.mask)
            # Every key that travels is seen by some query.
            assert not distance or used.all()
    assert torch.equal(found, visible(whole))


def test_a_narrow_window_takes_keys_from_the_neighbours_alone() -> None:
    mask = MaskSpec.from_lengths([64], causal=True, window=4)
    holdings = deal(row_lengths(mask, 1), 4)
    for rank in range(4):
        received = [hop.num_received for hop in plan_hops(holdings, rank, mask)]
        # Three keys before the front piece, from the rank before; three before the back, from the one after.
        assert received == [16, 3 * (rank > 0), 0, 3 * (rank < 3)]


def test_without_documents_a_causal_ring_sends_halves_forwards() -> None:
    mask = MaskSpec.from_lengths([64], causal=True)
    for rank, hops in enumerate(plan_hops(deal([np.array([64])], 4), rank, mask) for rank in range(4)):
        assert [hop.num_sent for hop in hops[1:]] == [8 if hop.to > rank else 16 for hop in hops[1:]]
        assert all(len(hop.calls) == 1 for hop in hops)
        assert not any(hop.calls[0].mask.causal for hop in hops[1:])


def test_documents_on_one_rank_send_nothing() -> None:
    mask = MaskSpec.from_lengths([1] * 40, causal=False)
    for rank in range(4):
        assert sum(hop.num_sent for hop in plan_hops(deal([np.ones(40, int)], 4), rank, mask)[1:]) == 0


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("ulysses_size", [1, 2])
def test_a_zigzag_layout_holds_every_place_once(size: int, ulysses_size: int) -> None:
    layout = ZigzagLayout(size, ulysses_size)
    mask = MaskSpec.from_lengths([5, 7, 12, 11, 1], causal=True)
    indices = [layout.indices(mask, 3, rank) for rank in range(layout.sp_size)]
    assert {tuple(places.shape) for places in indices} == {(3, layout.local_seq_len(12))}
    together = torch.cat(indices, dim=1).sort(dim=1).values
    assert torch.equal(together, torch.arange(12).expand(3, 12))


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(8, 8), (8, 4), (14, 2), (14, 7), (32, 8), (7, 1), (12, 4), (9, 3)]
)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("chunks", [1, 2])
def test_every_query_head_once_with_its_own_keys(heads: int, kv_heads: int, size: int, chunks: int) -> None:
    if size * chunks > heads:
        return
    rounds = spread_heads(heads, kv_heads, size, chunks)
    shares = [share for round_ in rounds for share in round_]
    assert sorted(head for share in shares for head in share.queries) == list(range(heads))
    for share in shares:
        width = len(share.queries) / len(share.slots)
        for place, head in enumerate(share.queries):
            assert share.keys[share.slots[int(place / width)]] == head // (heads // kv_heads)
    by_rank = [sum(len(round_[rank].queries) for round_ in rounds) for rank in range(size)]
    assert max(by_rank) - min(by_rank) <= 1
    if kv_heads % (size * chunks) == 0:
        assert sum(len(share.keys) for share in shares) == kv_heads
