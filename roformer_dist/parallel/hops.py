"""PURE: what the ranks of a ring send each other and which attention calls each hop is.

At hop h a rank attends with its queries to keys of the rank h before it. From the layout every rank
knows which keys those queries see, so just these are sent, straight from the rank that owns them: what
a document or a window hides does not travel. Between two ranks a document's pieces lie one behind the
other; without a window a hop is therefore one kernel call without a mask, over all documents at once.

A message holds, document by document, what is needed of the front piece and then of the back piece.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.parallel.zigzag import Holding, Integers, ranges


@dataclass(frozen=True)
class Call:
    """One kernel call: this rank's tokens ``queries`` over tokens ``keys`` of the message (None: all of them)."""

    queries: Tensor | None
    keys: Tensor | None
    mask: MaskSpec


@dataclass(frozen=True)
class Hop:
    """One step round the ring.

    Attributes:
        to, source: the ranks that this rank sends its keys to, and whose keys come.
        sent: which of this rank's tokens are sent (None: all), and how many those are.
        num_sent, num_received: tokens of the two messages.
        calls: what is computed with the message that came.
    """

    to: int
    source: int
    sent: Tensor | None
    num_sent: int
    num_received: int
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class _Needed:
    """The keys that one rank's queries see of another rank's; for each document that both hold.

    Attributes:
        of_queries, of_keys: ``[n]`` the document's place in the two holdings.
        front, back: ``[n, 2]`` start and stop of the needed part of the key pieces; may be empty.
    """

    of_queries: Integers
    of_keys: Integers
    front: Integers
    back: Integers

    @property
    def count(self) -> int:
        return int((self.front[:, 1] - self.front[:, 0] + self.back[:, 1] - self.back[:, 0]).sum())


def plan_hops(holdings: list[Holding], rank: int, mask: MaskSpec) -> list[Hop]:
    """The hops of ``rank``, its own keys first, hop h at place h: all ranks post messages in the same order."""
    assert mask.q_offset is mask.k_offset is None, "a ring is for whole documents"
    size, own = len(holdings), holdings[rank]
    hops = []
    for distance in range(size):
        to, source = (rank + distance) % size, (rank - distance) % size
        given = _needed(holdings[to], own, mask)
        came = _needed(own, holdings[source], mask)
        if not distance:
            given = came = _everything(own)
        make_calls = _calls_by_order if mask.distances in ((None, None), (0, None)) else _calls_by_position
        calls = make_calls(own, came, mask, own_keys=not distance)
        sent = None if given.count == own.local[-1] else _tensor(_local_places(own, given), mask)
        hops.append(Hop(to, source, sent, given.count, came.count, calls))
    return hops


def _everything(own: Holding) -> _Needed:
    all_documents = np.arange(len(own.document))
    return _Needed(all_documents, all_documents, own.front, own.back)


def _needed(queries: Holding, keys: Holding, mask: MaskSpec) -> _Needed:
    _, of_queries, of_keys = np.intersect1d(
        queries.document, keys.document, assume_unique=True, return_indices=True
    )
    pieces = (queries.front[of_queries], queries.back[of_queries])
    front, back = (_visible(piece[of_keys], pieces, mask) for piece in (keys.front, keys.back))
    return _Needed(of_queries, of_keys, front, back)


def _visible(keys: Integers, pieces: tuple[Integers, ...], mask: MaskSpec) -> Integers:
    """The part of each key piece ``[n, 2]`` between the first and the last key that any query piece sees."""
    starts, stops = [], []
    for queries in pieces:
        start, stop = _seen(queries, keys, mask)
        empty = start >= stop
        starts.append(np.where(empty, keys[:, 1], start))
        stops.append(np.where(empty, keys[:, 0], stop))
    start, stop = np.minimum(*starts), np.maximum(*stops)
    return np.stack([start, np.maximum(start, stop)], axis=1)


def _seen(queries: Integers, keys: Integers, mask: MaskSpec) -> tuple[Integers, Integers]:
    """Start and stop of the keys of ``keys`` that some query of ``queries`` sees; start >= stop for none."""
    start, stop = keys[:, 0], keys[:, 1]
    nearest, farthest = mask.distances
    if farthest is not None:
        start = np.maximum(start, queries[:, 0] - farthest)
    if nearest is not None:
        stop = np.minimum(stop, queries[:, 1] - nearest)
    return start, np.where(queries[:, 0] < queries[:, 1], stop, start)


def _local_places(own: Holding, needed: _Needed) -> Integers:
    """Where the needed keys stand among the local tokens of their owner."""
    first = own.local[needed.of_keys]
    behind = first + own.front[needed.of_keys, 1] - own.front[needed.of_keys, 0]
    front = needed.front - own.front[needed.of_keys, :1] + first[:, None]
    back = needed.back - own.back[needed.of_keys, :1] + behind[:, None]
    pieces = np.stack([front, back], axis=1).reshape(-1, 2)
    return ranges(pieces[:, 0], pieces[:, 1])


def _calls_by_order(own: Holding, came: _Needed, mask: MaskSpec, *, own_keys: bool) -> tuple[Call, ...]:
    """Without bounds on distance: a document's keys are seen whole by all of its queries, or by its back piece."""
    if own_keys:
        # Queries and keys are the same tokens in ascending order: as causal as neighbours would be.
        counts = np.diff(own.local)
        return (Call(None, None, _mask(mask, counts, counts, causal=mask.causal)),)
    lengths = (came.front[:, 1] - came.front[:, 0]) + (came.back[:, 1] - came.back[:, 0])
    front, back = own.front[came.of_queries], own.back[came.of_queries]
    first = own.local[came.of_queries]
    in_front = front[:, 1] - front[:, 0]
    # Only a front piece may lie before the keys that came.
    first_key = np.where(came.front[:, 0] < came.front[:, 1], came.front[:, 0], came.back[:, 0])
    skipped = np.where(mask.causal & (front[:, 0] < first_key), in_front, 0)
    queries = np.stack([first + skipped, first + in_front + back[:, 1] - back[:, 0]], axis=1)
    queries = np.where(lengths[:, None] > 0, queries, 0)
    num_queries = queries[:, 1] - queries[:, 0]
    if not num_queries.any():
        return ()
    chosen = (num_queries > 0) & (lengths > 0)
    call_mask = _mask(mask, num_queries[chosen], lengths[chosen], causal=False)
    places = ranges(queries[chosen, 0], queries[chosen, 1])
    return (Call(_all_or(places, int(own.local[-1]), mask), None, call_mask),)


def _calls_by_position(own: Holding, came: _Needed, mask: MaskSpec, *, own_keys: bool) -> tuple[Call, ...]:
    """With bounds on distance: a call for each pair of query and key pieces, which know their positions."""
    first = own.local[came.of_queries]
    front, back = own.front[came.of_queries], own.back[came.of_queries]
    lengths = [piece[:, 1] - piece[:, 0] for piece in (came.front, came.back)]
    before = np.cumsum(lengths[0] + lengths[1]) - (lengths[0] + lengths[1])
    calls = []
    for queries, query_place in ((front, first), (back, first + front[:, 1] - front[:, 0])):
        for keys, key_place in ((came.front, before), (came.back, before + lengths[0])):
            start, stop = _seen(queries, keys, mask)
            pairs = np.flatnonzero(start < stop)
            if not len(pairs):
                continue
            q, k = queries[pairs], keys[pairs]
            call_mask = _mask(
                mask, q[:, 1] - q[:, 0], k[:, 1] - k[:, 0], causal=mask.causal, starts=(q[:, 0], k[:, 0])
            )
            q_places = ranges(query_place[pairs], query_place[pairs] + q[:, 1] - q[:, 0])
            k_places = ranges(key_place[pairs], key_place[pairs] + k[:, 1] - k[:, 0])
            calls.append(
                Call(
                    _all_or(q_places, int(own.local[-1]), mask),
                    _all_or(k_places, came.count, mask),
                    call_mask,
                )
            )
    return tuple(calls)


def _mask(
    mask: MaskSpec,
    q_lengths: Integers,
    k_lengths: Integers,
    *,
    causal: bool,
    starts: tuple[Integers, Integers] | None = None,
) -> MaskSpec:
    device = mask.cu_seqlens_q.device
    prefix = [
        torch.from_numpy(np.append(0, np.cumsum(n)).astype(np.int32)).to(device)
        for n in (q_lengths, k_lengths)
    ]
    offsets = [torch.from_numpy(s.astype(np.int32)).to(device) for s in starts] if starts else [None, None]
    return replace(
        mask,
        cu_seqlens_q=prefix[0],
        cu_seqlens_k=prefix[1],
        max_q=int(q_lengths.max(initial=0)),
        max_k=int(k_lengths.max(initial=0)),
        causal=causal,
        q_offset=offsets[0],
        k_offset=offsets[1],
    )


def _all_or(places: Integers, count: int, mask: MaskSpec) -> Tensor | None:
    # Places ascend without repetition, so as many as there are tokens are all of them.
    return None if len(places) == count else _tensor(places, mask)


def _tensor(places: Integers, mask: MaskSpec) -> Tensor:
    return torch.from_numpy(places).to(mask.cu_seqlens_q.device)
