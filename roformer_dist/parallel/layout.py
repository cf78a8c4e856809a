"""PURE: which tokens of a row sit on which rank, and the slice of a batch that a rank gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from roformer_dist.batch import IGNORE_INDEX, Batch, MaskSpec


@dataclass(frozen=True)
class ContiguousLayout:
    """Rank r holds tokens ``r * n`` to ``(r + 1) * n`` of each row, n the same on every rank.

    Rows whose length the ranks do not divide are padded at the end by fewer than ``sp_size`` tokens,
    which form a document of their own and count for nothing.
    """

    sp_size: int

    def local_seq_len(self, seq_len: int) -> int:
        """Tokens of a row on one rank, padding included."""
        return -(-seq_len // self.sp_size)

    def indices(self, seq_len: int, sp_rank: int) -> range:
        """Places in the (padded) row that ``sp_rank`` holds."""
        local = self.local_seq_len(seq_len)
        return range(sp_rank * local, (sp_rank + 1) * local)

    def slice(self, batch: Batch, sp_rank: int) -> Batch:
        """The part of ``batch`` on ``sp_rank``; the mask stays that of the whole micro-batch.

        Labels are targets already, so a token at the edge of a slice keeps its target.
        """
        seq_len = batch.input_ids.shape[1]
        padding = self.local_seq_len(seq_len) * self.sp_size - seq_len
        padded = _pad(batch, padding) if padding else batch
        places = self.indices(seq_len, sp_rank)
        cut = slice(places.start, places.stop)
        return replace(
            _per_token(padded, lambda x, _: x[:, cut].contiguous()),
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
    return replace(padded, mask=_pad_mask(batch.mask, batch.input_ids.shape[1], padding))


def _pad_mask(mask: MaskSpec, seq_len: int, padding: int) -> MaskSpec:
    """Self-attention documents of rows of ``seq_len``, with a document of ``padding`` after each row."""
    lengths: list[int] = []
    filled = 0
    for length in torch.diff(mask.cu_seqlens_q).tolist():
        lengths.append(length)
        filled += length
        if filled == seq_len:
            lengths.append(padding)
            filled = 0
        elif filled > seq_len:
            raise ValueError(f"a document crosses the end of a row of {seq_len} tokens")
    return MaskSpec.from_lengths(lengths, causal=mask.causal, window=mask.window)
