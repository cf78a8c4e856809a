"""What must hold on every step: each token of the batch is on one rank, with its own input, target and position.

Checksums are sums of a hash of (counter, value) over tokens, so the order and the slicing do not matter.
A counter is a token's number in the run, so what is missing, doubled or exchanged changes the sum. What
pads a row between ranks has counter and position 0, whose hash is 0, and no target.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from roformer_dist.batch import IGNORE_INDEX, Batch

# Sums over ranks travel in float64 and must stay whole numbers: 2^13 ranks at 40 bits.
BITS = 40
NAMES = ("input_ids", "labels", "positions")
# A step's norm is one number; the sums of it and of its square over ranks tell a deviation above this.
NORM_TOLERANCE = 1e-4


class InvariantError(RuntimeError):
    """What was trained is not the batch, or not one model; raised on every rank, with the same words."""


def checksums(batches: Iterable[Batch]) -> tuple[int, ...]:
    """Checksums of ``NAMES`` over micro-batches, whole or sliced, below ``2 ** BITS``.

    The targets of a classified row, its class and what it is pooled by, count as labels of its tokens.
    """
    totals = [0] * len(NAMES)
    for batch in batches:
        labels = _hash(batch.counters, batch.labels + 1) * (batch.labels != IGNORE_INDEX)
        if batch.row_labels is not None:
            # Every rank has all classes; what pads a row has counter 0 and is no token of it.
            labels = labels + _hash(batch.counters, batch.row_labels[:, None] + 1) * (batch.counters != 0)
        if batch.pool_weights is not None:
            labels = labels + _hash(batch.counters, batch.pool_weights.contiguous().view(torch.int32))
        inputs, positions = (_hash(batch.counters, x) for x in (batch.input_ids, batch.position_ids))
        totals = [total + int(value.sum()) for total, value in zip(totals, (inputs, labels, positions))]
    return tuple(total % 2**BITS for total in totals)


def labels_checksum(batches: Iterable[Batch]) -> int:
    """The one of the targets."""
    return checksums(batches)[NAMES.index("labels")]


def share(batches: Iterable[Batch], rank: int, size: int) -> list[Batch]:
    """A ``size``-th of the columns of whole micro-batches: ranks that hash their share have hashed everything."""
    return [_columns(batch, rank, size) for batch in batches]


def check_checksums(found: Sequence[float], expected: Sequence[float], step: int) -> None:
    """Compare sums over all ranks.

    Raises:
        InvariantError: naming the invariant and both numbers.
    """
    for name, ours, theirs in zip(NAMES, found, expected, strict=True):
        ours, theirs = int(ours) % 2**BITS, int(theirs) % 2**BITS
        if ours != theirs:
            raise InvariantError(
                f"step {step}: checksum of {name} over the ranks {ours:#012x}, of the unsliced batch {theirs:#012x}; "
                "the slices are not the batch"
            )


def norms_agree(total: float, squares: float, size: int) -> bool:
    """Whether ``size`` numbers with this sum and this sum of squares are one number."""
    # Not "<=" alone: what is not finite is reported as such, elsewhere.
    return not size * squares - total**2 > (NORM_TOLERANCE * total) ** 2


def _hash(counters: Tensor, values: Tensor) -> Tensor:
    """A mix of both, int64; 0 for two zeros."""
    x = counters * 0x1E3779B97F4A7C15 + values.to(torch.int64) * 0x3F58476D1CE4E5B9
    x = (x ^ (x >> 30)) * 0x14D049BB133111EB
    return x ^ (x >> 27)


def _columns(batch: Batch, rank: int, size: int) -> Batch:
    seq_len = batch.input_ids.shape[1]
    columns = slice(seq_len * rank // size, seq_len * (rank + 1) // size)
    return Batch(
        batch.input_ids[:, columns],
        batch.labels[:, columns],
        batch.position_ids[:, columns],
        batch.counters[:, columns],
        batch.mask,
        row_labels=batch.row_labels,
        pool_weights=None if batch.pool_weights is None else batch.pool_weights[:, columns],
    )
