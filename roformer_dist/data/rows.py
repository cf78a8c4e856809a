"""From rows of a plan to a ``Batch``: reading pieces, shifting labels, restarting positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from roformer_dist.batch import IGNORE_INDEX, Batch, MaskSpec
from roformer_dist.data.objective import Objective, slot_counters
from roformer_dist.data.plan import Plan
from roformer_dist.data.store import ShardStore


@dataclass(frozen=True)
class Row:
    """The tokens of one row before an objective is applied.

    Attributes:
        tokens: int64 ``[seq_len]``, padding at the end.
        next_tokens: int64 ``[seq_len]``, the next token of the same document even when it is in
            another row; ``IGNORE_INDEX`` at a document's last token and at padding.
        lengths: tokens of each piece, then of the padding if there is any; sums to ``seq_len``.
    """

    tokens: np.ndarray
    next_tokens: np.ndarray
    lengths: list[int]


def read_row(store: ShardStore, plan: Plan, row: int) -> Row:
    """Read the documents of one row; raises ``DataError`` when one is damaged."""
    tokens, next_tokens, lengths = _padding(store, plan)
    position = 0
    pieces = plan.pieces(row)
    for document, start, length in zip(
        plan.document[pieces].tolist(), plan.start[pieces].tolist(), plan.length[pieces].tolist()
    ):
        ids = store.read(document)
        following = ids[start + 1 : start + 1 + length]
        tokens[position : position + length] = ids[start : start + length]
        next_tokens[position : position + len(following)] = following
        position += length
        lengths.append(length)
    if position < plan.seq_len:
        lengths.append(plan.seq_len - position)
    return Row(tokens, next_tokens, lengths)


def empty_row(store: ShardStore, plan: Plan) -> Row:
    """A row of padding, in which nothing counts."""
    tokens, next_tokens, _ = _padding(store, plan)
    return Row(tokens, next_tokens, [plan.seq_len])


def _padding(store: ShardStore, plan: Plan) -> tuple[np.ndarray, np.ndarray, list[int]]:
    tokens = np.full(plan.seq_len, store.manifest.pad_id, dtype=np.int64)
    return tokens, np.full(plan.seq_len, IGNORE_INDEX, dtype=np.int64), []


def make_batch(rows: list[Row], slots: np.ndarray, objective: Objective, seed: int) -> Batch:
    """One micro-batch of ``rows`` at ``slots`` (int64 ``[rows]``).

    Positions restart at 0 in each piece, and each piece (and each row's padding) is a document of
    its own to attention.
    """
    seq_len = len(rows[0].tokens)
    counters = slot_counters(slots, seq_len)
    pairs = [
        objective.apply(row.tokens, row.next_tokens, counter, seed)
        for row, counter in zip(rows, counters, strict=True)
    ]
    positions = [np.concatenate([np.arange(length) for length in row.lengths]) for row in rows]
    return Batch(
        input_ids=torch.from_numpy(np.stack([inputs for inputs, _ in pairs])),
        labels=torch.from_numpy(np.stack([labels for _, labels in pairs])),
        position_ids=torch.from_numpy(np.stack(positions)),
        counters=torch.from_numpy(counters),
        mask=MaskSpec.from_lengths(
            [length for row in rows for length in row.lengths], causal=objective.causal
        ),
    )
