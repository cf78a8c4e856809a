"""From rows of a plan to a ``Batch``: reading pieces, shifting labels, restarting positions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch

from roformer_dist.batch import IGNORE_INDEX, Batch, MaskSpec
from roformer_dist.data.errors import DamagedDocument
from roformer_dist.data.objective import Objective, counting, piece_numbers, slot_counters
from roformer_dist.data.plan import Plan
from roformer_dist.data.store import ShardStore


@dataclass(frozen=True)
class Row:
    """The tokens of one row before an objective is applied.

    Attributes:
        tokens: int64 ``[seq_len]``, padding at the end.
        next_tokens: int64 ``[seq_len]``, the next token of the same document even when it is in
            another row; ``IGNORE_INDEX`` at a document's last token and at padding.
        lengths: tokens of what attention keeps apart, in order: each piece (or the whole text, where the
            plan has no ``document_mask``), then the padding if there is any; sums to ``seq_len``.
    """

    tokens: np.ndarray
    next_tokens: np.ndarray
    lengths: list[int]


def read_row(store: ShardStore, plan: Plan, row: int, quarantined: Collection[int] = frozenset()) -> Row:
    """Read the documents of one row; see ``read_rows``.

    Raises:
        DamagedDocument: the bytes of a document are not those that were written.
        DataError: a shard cannot be read.
    """
    out = np.empty((2, 1, plan.seq_len), dtype=np.int64)
    (lengths,) = read_rows(store, plan, np.array([row]), out, np.zeros(1, dtype=np.int64), quarantined)
    return Row(out[0, 0], out[1, 0], lengths)


def read_rows(
    store: ShardStore,
    plan: Plan,
    rows: np.ndarray,
    out: np.ndarray,
    places: np.ndarray,
    quarantined: Collection[int] = frozenset(),
    damaged: Callable[[DamagedDocument], object] | None = None,
) -> list[list[int]]:
    """Read the documents of rows; pieces of a ``quarantined`` document become padding.

    Where the plan has no ``document_mask``, what lies between such padding is one document to attention.

    Args:
        rows: int64 ``[n]``.
        out: int64 ``[2, rows of it, seq_len]``, contiguous but for its first dim; row ``rows[i]`` becomes
            ``out[:, places[i]]``: its tokens and its next tokens as in ``Row``.
        places: int64 ``[n]``.
        damaged: told of each damaged document, once for each of its pieces, whose place is left as it was.

    Returns:
        The ``lengths`` of each ``Row``.

    Raises:
        DamagedDocument: the bytes of a document are not those that were written, and ``damaged`` is None.
        DataError: a shard cannot be read.
    """
    tokens, next_tokens = out[0].reshape(-1), out[1].reshape(-1)
    pieces = piece_numbers(plan, rows)
    counts = (plan.row_offsets[rows + 1] - plan.row_offsets[rows]).tolist()
    found = zip(plan.document[pieces].tolist(), plan.start[pieces].tolist(), plan.length[pieces].tolist())
    of_rows: list[list[int]] = []
    for place, count in zip(places.tolist(), counts, strict=True):
        lengths, apart, end = [], [], place * plan.seq_len
        for document, start, length in islice(found, count):
            begin, end = end, end + length
            lengths.append(length)
            apart.append(document in quarantined)
            if apart[-1]:
                tokens[begin:end], next_tokens[begin:end] = store.manifest.pad_id, IGNORE_INDEX
                continue
            try:
                # One token more than the piece: the target of its last one, unless the document ends here.
                ids = store.read_stored(document, start, length + 1)
            except DamagedDocument as error:
                if damaged is None:
                    raise
                damaged(error)
                continue
            tokens[begin:end] = ids[:length]
            targets = len(ids) - 1
            next_tokens[begin : begin + targets] = ids[1:]
            next_tokens[begin + targets : end] = IGNORE_INDEX
        if not plan.document_mask:
            lengths = _joined(lengths, apart)
        stop = (place + 1) * plan.seq_len
        if end < stop:
            tokens[end:stop], next_tokens[end:stop] = store.manifest.pad_id, IGNORE_INDEX
            lengths.append(stop - end)
        of_rows.append(lengths)
    return of_rows


def _joined(lengths: list[int], apart: list[bool]) -> list[int]:
    """Neighbouring pieces as one run; those that stand ``apart`` stay so."""
    runs: list[int] = []
    for number, length in enumerate(lengths):
        if number and not apart[number] and not apart[number - 1]:
            runs[-1] += length
        else:
            runs.append(length)
    return runs


def empty_row(store: ShardStore, plan: Plan) -> Row:
    """A row of padding, in which nothing counts."""
    tokens = np.full(plan.seq_len, store.manifest.pad_id, dtype=np.int64)
    return Row(tokens, np.full(plan.seq_len, IGNORE_INDEX, dtype=np.int64), [plan.seq_len])


def make_batch(rows: list[Row], slots: np.ndarray, objective: Objective, seed: int) -> Batch:
    """One micro-batch of ``rows`` at ``slots`` (int64 ``[rows]``); see ``make_batches``."""
    (batch,) = make_batches(rows, slots, len(rows), objective, seed)
    return batch


def step_space(slots: int, seq_len: int) -> np.ndarray:
    """Room for the inputs, labels, positions and counters of a step, int64 ``[4, slots, seq_len]``."""
    # One allocation for everything: the system hands out a few large pages, not many small ones.
    return np.empty((4, slots, seq_len), dtype=np.int64)


def make_batches(
    rows: Iterable[Row],
    slots: np.ndarray,
    micro_batch_size: int,
    objective: Objective,
    seed: int,
    space: np.ndarray | None = None,
) -> list[Batch]:
    """The micro-batches of a step: ``rows`` at ``slots`` (int64 ``[rows]``), cut in order.

    Positions restart at 0 in each of a row's ``lengths``, and each of them is a document of its own
    to attention. ``rows`` may be read while they are asked for; all have one length. Where ``space`` is
    given (see ``step_space``), row ``n`` was read into ``space[:2, n]``, and the batches are made of it.
    """
    lengths: list[list[int]] = []
    slab = np.empty(0, dtype=np.int64) if space is None else space
    for number, row in enumerate(rows):
        if number == 0:
            slab = step_space(len(slots), len(row.tokens)) if space is None else space
            slot_counters(slots, len(row.tokens), out=slab[3])
        inputs, labels, positions, counters = slab[:, number]
        found = objective.apply(row.tokens, row.next_tokens, counters, seed)
        if space is None or found[0] is not row.tokens:
            inputs[:], labels[:] = found
        _count_positions(positions, row.lengths)
        lengths.append(row.lengths)
    assert len(lengths) == len(slots), f"{len(lengths)} rows at {len(slots)} slots"
    batches = []
    for first in range(0, len(slots), micro_batch_size):
        part = slice(first, first + micro_batch_size)
        inputs, labels, positions, counters = (torch.from_numpy(slab[kind, part]) for kind in range(4))
        mask = MaskSpec.from_lengths(list(chain.from_iterable(lengths[part])), causal=objective.causal)
        batches.append(Batch(inputs, labels, positions, counters, mask))
    return batches


def _count_positions(positions: np.ndarray, lengths: list[int]) -> None:
    count, begin = counting(len(positions)), 0
    for length in lengths:
        positions[begin : begin + length] = count[:length]
        begin += length
