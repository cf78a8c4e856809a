"""A cache of keys and values that lies on several ranks: queries go to the keys, and what they found comes back.

Each rank keeps the same share of every sequence's keys and never sends them. A read of many tokens is computed by all
ranks, each its part of the tokens: their queries are gathered, every rank attends with all of them to its own keys,
and the partial results go home and are merged by lse in float32. A read of single tokens is computed by all ranks
alike, so that only partial results travel. (Pass-Q of arXiv 2411.01783, with a gather in the place of a ring.)

Shapes: T tokens of a read over all its sequences, t this rank's, U its keys, N heads, M key/value heads, D head_dim,
P ranks, W most tokens of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels.attention import Kernel, ScoreBias, ScorePart
from roformer_dist.kernels.biased import biased_forward
from roformer_dist.kernels.parts import merge
from roformer_dist.parallel.attention import LocalScheme, ParallelSequenceOps
from roformer_dist.parallel.comm import Comm

Distances = tuple[int | None, int | None]


def part_of(places: range, rank: int, size: int) -> range:
    """PURE: the part of a read's ``places`` that ``rank`` keeps, the parts following each other in order of ranks.

    A rank has as many as if tokens were dealt to the ranks one by one from the first of the sequence, so that no
    two ranks ever differ by more than one.
    """

    def dealt(tokens: int, to: int) -> int:
        return (tokens + size - 1 - to) // size

    counts = [dealt(places.stop, r) - dealt(places.start, r) for r in range(size)]
    start = places.start + sum(counts[:rank])
    return range(start, start + counts[rank])


@dataclass(frozen=True)
class Visible:
    """Some of a rank's keys that a run of queries sees: their places among the rank's, and how.

    Attributes:
        first: position of the first key, where positions follow each other; None: every query sees every key.
    """

    keys: slice
    first: int | None


def visible_keys(queries: range, positions: np.ndarray, distances: Distances) -> list[Visible]:
    """PURE: keys at ascending ``positions`` within ``distances`` (nearest, farthest) of queries at ``queries``.

    Those that all of the queries see are one run. Those at an edge, which some see, are runs of neighbours.
    """
    nearest, farthest = distances

    def place(position: int) -> int:
        return int(np.searchsorted(positions, position))

    last = queries.stop - 1
    start, full_start = (
        0 if farthest is None else place(first - farthest) for first in (queries.start, last)
    )
    stop, full_stop = (
        len(positions) if nearest is None else place(end - nearest + 1) for end in (last, queries.start)
    )
    if full_start >= full_stop:
        return [*_runs(positions, start, stop)]
    seen = Visible(slice(full_start, full_stop), None)
    return [*_runs(positions, start, full_start), seen, *_runs(positions, full_stop, stop)]


def _runs(positions: np.ndarray, start: int, stop: int) -> Iterator[Visible]:
    if start >= stop:
        return
    cuts = start + 1 + np.flatnonzero(np.diff(positions[start:stop]) != 1)
    bounds = [start, *cuts.tolist(), stop]
    for low, high in pairwise(bounds):
        yield Visible(slice(low, high), int(positions[low]))


class SharedCache:
    """Ranks that keep a cache together; see ``model.sharing.CacheRanks``.

    Args:
        kernel: what attends.
        comm: the ranks; all of them read the same.
    """

    def __init__(self, kernel: Kernel, comm: Comm, device: torch.device | str = "cpu") -> None:
        self._kernel, self._comm, self._device = kernel, comm, device

    def room(self, tokens: int) -> int:
        """See CacheRanks."""
        return -(-tokens // self._comm.size)

    def share(self, spans: Sequence[range]) -> SharedRead:
        """See CacheRanks."""
        return SharedRead(self._kernel, self._comm, spans)

    def agree(self, tokens: Sequence[int]) -> None:
        """See CacheRanks."""
        everyone = self._comm.all_gather(torch.tensor(list(tokens), device=self._device))
        for rank, theirs in enumerate(everyone.tolist()):
            if theirs != everyone[0].tolist():
                raise RuntimeError(
                    f"rank {rank} chose the tokens {theirs} and rank 0 {everyone[0].tolist()}: the ranks do not "
                    "compute the same; are their machines, libraries and checkpoint the same?"
                )


class SharedRead:
    """One rank's part of a read; see ``model.sharing.ReadShare``."""

    def __init__(self, kernel: Kernel, comm: Comm, spans: Sequence[range]) -> None:
        self._kernel, self.comm, self.spans = kernel, comm, list(spans)
        parts = [[part_of(span, rank, comm.size) for span in self.spans] for rank in range(comm.size)]
        self.counts = [sum(map(len, each)) for each in parts]
        # Single tokens are not worth a gather; and no rank is left without any.
        self.spread = max(map(len, self.spans)) > 1 and min(self.counts) > 0
        self.kept = parts[comm.rank]
        self.tokens = self.kept if self.spread else self.spans
        starts = np.cumsum([0, *(len(span) for span in self.spans)])
        # Places in the order of the read of each rank's tokens, one rank after the other.
        self.order = np.concatenate(
            [
                np.arange(part.start, part.stop) - span.start + start
                for each in parts
                for part, span, start in zip(each, self.spans, starts)
            ]
        )

    def attention(self, positions: Sequence[np.ndarray]) -> HeldKeys:
        """See ReadShare."""
        return HeldKeys(self._kernel, self, positions)

    def everyone(self, x: Tensor) -> Tensor:
        """See ReadShare."""
        if not self.spread:
            return x
        widest = max(self.counts)
        padding = [0, 0] * (x.ndim - 1) + [0, widest - len(x)]
        gathered = self.comm.all_gather(F.pad(x, padding))
        parts = torch.cat([part[:count] for part, count in zip(gathered, self.counts)])
        whole = torch.empty_like(parts)
        whole[torch.from_numpy(self.order).to(x.device)] = parts
        return whole

    def home(self, out: Tensor, lse: Tensor) -> Tensor:
        """Partial ``out`` ``[T, N, D]`` and ``lse`` ``[N, T]`` of each rank, merged: ``[t, N, D]`` over all keys."""
        found = torch.cat([out, lse.T[..., None]], -1)
        if self.spread:
            own = self.counts[self.comm.rank]
            sent = found[torch.from_numpy(self.order).to(found.device)]
            found = self.comm.all_to_all(sent, self.counts, [own] * self.comm.size)
            found = found.unflatten(0, (self.comm.size, own))
        else:
            found = self.comm.all_gather(found)
        out, lse = found[..., :-1], found[..., -1:]
        # Some rank holds the query's own key, so the largest is finite.
        weights = (lse - lse.amax(0)).exp()
        return (weights * out).sum(0) / weights.sum(0)

    def sums(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See ReadShare."""
        if not self.spread:
            return torch.zeros_like(x), x
        everyone = self.comm.all_gather(x)
        return everyone[: self.comm.rank].sum(0), everyone.sum(0)


class HeldKeys(ParallelSequenceOps):
    """SequenceOps of one rank whose softmax attention reaches the keys that all ranks hold.

    Args:
        read: whose queries attend.
        positions: those of this rank's keys, by sequence.
    """

    def __init__(self, kernel: Kernel, read: SharedRead, positions: Sequence[np.ndarray]) -> None:
        super().__init__(kernel, LocalScheme())
        self._read = read
        self._positions = positions
        # A read's keys serve all layers of a kind.
        self._seen: dict[tuple[Distances, torch.device], list[tuple[slice, slice, MaskSpec]]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float) -> Tensor:
        """See SequenceOps; ``mask`` says which distances are seen."""
        return self.attend_parts([ScorePart(q, k, mask)], v, softmax_scale)

    def attend_parts(self, parts: Sequence[ScorePart], v: Tensor, softmax_scale: float) -> Tensor:
        """See SequenceOps."""
        partial = None
        for part in parts:
            q, k, values = self._read.everyone(part.q[0]), part.k[0], v[0]

            def call(
                queries: slice, keys: slice, mask: MaskSpec, q: Tensor = q, k: Tensor = k
            ) -> tuple[Tensor, Tensor]:
                return self.kernel.forward(q[queries], k[keys], values[keys], mask, softmax_scale)  # noqa: B023

            found = self._partial(q, part.mask, call)
            partial = found if partial is None else merge(*partial, *found)
        assert partial is not None, "attention has a part"
        return self._read.home(*partial).to(v.dtype)[None]

    def attend_biased(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float, bias: ScoreBias
    ) -> Tensor:
        """See SequenceOps."""
        everyone = self._read.everyone(q[0])
        q_positions = torch.cat([torch.arange(span.start, span.stop) for span in self._read.spans]).to(
            q.device
        )
        k_positions = bias.k_positions[0]

        def call(queries: slice, keys: slice, mask: MaskSpec) -> tuple[Tensor, Tensor]:
            term = ScoreBias(bias.values, bias.function, q_positions[queries], k_positions[keys])
            return biased_forward(everyone[queries], k[0, keys], v[0, keys], mask, softmax_scale, term)

        return self._read.home(*self._partial(everyone, mask, call)).to(v.dtype)[None]

    def _partial(
        self, q: Tensor, mask: MaskSpec, call: Callable[[slice, slice, MaskSpec], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """``(out [T, N, D], lse [N, T])`` of all queries ``[T, N, D]`` over this rank's keys, in float32."""
        work = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=work, device=q.device)
        lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=work, device=q.device)
        for queries, keys, seen in self._calls(mask, q.device):
            found = call(queries, keys, seen)
            out[queries], lse[:, queries] = merge(out[queries], lse[:, queries], *found)
        return out, lse

    def _calls(self, mask: MaskSpec, device: torch.device) -> list[tuple[slice, slice, MaskSpec]]:
        key = (mask.distances, device)
        if key not in self._seen:
            self._seen[key] = list(self._make_calls(mask, device))
        return self._seen[key]

    def _make_calls(self, mask: MaskSpec, device: torch.device) -> Iterator[tuple[slice, slice, MaskSpec]]:
        first_query = first_key = 0
        for span, positions in zip(self._read.spans, self._positions):
            queries = slice(first_query, first_query + len(span))
            for seen in visible_keys(span, positions, mask.distances):
                keys = slice(first_key + seen.keys.start, first_key + seen.keys.stop)
                yield (
                    queries,
                    keys,
                    _mask(mask, len(span), keys.stop - keys.start, span.start, seen.first, device),
                )
            first_query, first_key = queries.stop, first_key + len(positions)


def _mask(
    mask: MaskSpec, q_len: int, k_len: int, q_offset: int, k_offset: int | None, device: torch.device
) -> MaskSpec:
    """One run of queries and keys: what ``mask`` says of distances, or (no ``k_offset``) all see all."""

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    cu_q, cu_k = integers(0, q_len), integers(0, k_len)
    if k_offset is None:
        return MaskSpec(cu_q, cu_k, q_len, k_len, causal=False)
    return replace(
        mask,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_q=q_len,
        max_k=k_len,
        q_offset=integers(q_offset),
        k_offset=integers(k_offset),
    )
