"""PURE: which tokens of a row sit on which rank, and the slice of a batch that a rank gets.

``labels`` are targets already, so slicing is index work and nothing else. Rows whose length the ranks
do not divide are padded at the end by fewer than ``sp_size`` tokens, which form a document of their
own and count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from roformer_dist.batch import IGNORE_INDEX, Batch, MaskSpec
from roformer_dist.parallel.zigzag import Holding, deal


class Layout(Protocol):
    """How rows are spread over ``sp_size`` ranks; every rank holds the same number of tokens of each row."""

    @property
    def sp_size(self) -> int:
        """Ranks that share a row."""
        ...

    def local_seq_len(self, seq_len: int) -> int:
        """Tokens of a row on one rank, padding included."""
        ...

    def indices(self, mask: MaskSpec, rows: int, sp_rank: int) -> Tensor:
        """Places in each padded row that ``sp_rank`` holds, int64 ``[rows, local_seq_len]``, in local order.

        ``mask`` is that of the padded micro-batch, as ``slice`` returns it.
        """
        ...

    def all_indices(self, mask: MaskSpec, rows: int) -> list[Tensor]:
        """``indices`` of every rank."""
        ...

    def slice(self, batch: Batch, sp_rank: int) -> Batch:
        """The part of ``batch`` on ``sp_rank``; its mask is that of the whole (padded) micro-batch."""
        ...


@dataclass(frozen=True)
class ContiguousLayout:
    """Rank r holds tokens ``r * n`` to ``(r + 1) * n`` of each row (no scheme, Ulysses)."""

    sp_size: int

    def local_seq_len(self, seq_len: int) -> int:
        """See Layout."""
        return -(-seq_len // self.sp_size)

    def indices(self, mask: MaskSpec, rows: int, sp_rank: int) -> Tensor:
        """See Layout."""
        local = _row_length(mask, rows) // self.sp_size
        return (sp_rank * local + torch.arange(local)).expand(rows, local)

    def all_indices(self, mask: MaskSpec, rows: int) -> list[Tensor]:
        """See Layout."""
        return [self.indices(mask, rows, rank) for rank in range(self.sp_size)]

    def slice(self, batch: Batch, sp_rank: int) -> Batch:
        """See Layout."""
        return _take(self, batch, sp_rank)


@dataclass(frozen=True)
class ZigzagLayout:
    """Every document in a zigzag over a ring, each ring rank's tokens cut over ``ulysses_size`` ranks.

    ``sp_rank = ring_rank * ulysses_size + ulysses_rank``. Inside a ring rank the documents stand in the
    order of the row and the tokens of each in ascending order.
    """

    ring_size: int
    ulysses_size: int = 1

    @property
    def sp_size(self) -> int:
        """See Layout."""
        return self.ring_size * self.ulysses_size

    def local_seq_len(self, seq_len: int) -> int:
        """See Layout."""
        return -(-seq_len // self.sp_size)

    def holdings(self, mask: MaskSpec, rows: int) -> list[Holding]:
        """What each rank of the ring holds, by document."""
        return deal(row_lengths(mask, rows), self.ring_size)

    def indices(self, mask: MaskSpec, rows: int, sp_rank: int) -> Tensor:
        """See Layout."""
        ring_rank, ulysses_rank = divmod(sp_rank, self.ulysses_size)
        return self._cut(self.holdings(mask, rows)[ring_rank], mask, rows)[ulysses_rank]

    def all_indices(self, mask: MaskSpec, rows: int) -> list[Tensor]:
        """See Layout."""
        return [part for holding in self.holdings(mask, rows) for part in self._cut(holding, mask, rows)]

    def _cut(self, holding: Holding, mask: MaskSpec, rows: int) -> list[Tensor]:
        """The places of each rank that shares a ring rank's ``holding``."""
        starts = mask.cu_seqlens_q.cpu().numpy().astype(np.int64)
        places = holding.places(starts).reshape(rows, -1) - np.arange(rows)[:, None] * _row_length(mask, rows)
        return [torch.from_numpy(part.copy()) for part in np.split(places, self.ulysses_size, axis=1)]

    def slice(self, batch: Batch, sp_rank: int) -> Batch:
        """See Layout."""
        return _take(self, batch, sp_rank)


class PlanKey:
    """What a plan of messages depends on; equal for equal masks."""

    def __init__(self, mask: MaskSpec, rows: int) -> None:
        self.mask, self.rows = mask, rows
        self._values = (mask.documents, mask.causal, mask.distances, rows, mask.cu_seqlens_q.device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlanKey) and self._values == other._values

    def __hash__(self) -> int:
        return hash(self._values)


def choose_layout(ulysses_size: int, ring_size: int) -> Layout:
    """The layout of a mesh: contiguous without a ring, zigzag with one."""
    return ZigzagLayout(ring_size, ulysses_size) if ring_size > 1 else ContiguousLayout(ulysses_size)


def row_lengths(mask: MaskSpec, rows: int) -> list[np.ndarray]:
    """Document lengths of each row.

    Raises:
        ValueError: a document crosses the end of a row.
    """
    starts = mask.cu_seqlens_q.cpu().numpy().astype(np.int64)
    seq_len = _row_length(mask, rows)
    # Documents without tokens may stand at the end of a row; they belong to either.
    cuts = np.searchsorted(starts, np.arange(1, rows) * seq_len)
    if not np.array_equal(starts[cuts], np.arange(1, rows) * seq_len):
        raise ValueError(f"a document crosses the end of a row of {seq_len} tokens")
    return np.split(np.diff(starts), cuts)


def _row_length(mask: MaskSpec, rows: int) -> int:
    return int(mask.cu_seqlens_q[-1]) // rows


def _take(layout: Layout, batch: Batch, sp_rank: int) -> Batch:
    rows, seq_len = batch.input_ids.shape
    padding = layout.local_seq_len(seq_len) * layout.sp_size - seq_len
    padded = _pad(batch, padding) if padding else batch
    places = layout.indices(padded.mask, rows, sp_rank).to(batch.input_ids.device)
    return replace(
        _per_token(padded, lambda x, _: x.gather(1, places)),
        extent=float(batch.position_ids.max()) + 1 if batch.extent is None else batch.extent,
    )


# What pads a row, for everything that has a value for each token.
PADDING = {
    "input_ids": 0,
    "labels": IGNORE_INDEX,
    "position_ids": 0,
    "counters": 0,
    "token_type_ids": 0,
    "pool_weights": 0,
}


def _per_token(batch: Batch, change: Callable[[Tensor, int], Tensor]) -> Batch:
    """``batch`` with every per-token tensor changed, given it and its padding value."""
    values = {name: getattr(batch, name) for name in PADDING}
    return replace(batch, **{n: change(x, PADDING[n]) for n, x in values.items() if x is not None})


def _pad(batch: Batch, padding: int) -> Batch:
    padded = _per_token(batch, lambda x, value: F.pad(x, (0, padding), value=value))
    return replace(padded, mask=_pad_mask(batch.mask, batch.input_ids.shape[0], padding))


def _pad_mask(mask: MaskSpec, rows: int, padding: int) -> MaskSpec:
    """The mask with a document of ``padding`` tokens after each row."""
    lengths = np.concatenate([np.append(row, padding) for row in row_lengths(mask, rows)])
    padded = MaskSpec.from_lengths(lengths.tolist(), causal=mask.causal)
    return replace(
        mask,
        cu_seqlens_q=padded.cu_seqlens_q,
        cu_seqlens_k=padded.cu_seqlens_k,
        max_q=padded.max_q,
        max_k=padded.max_k,
    )
