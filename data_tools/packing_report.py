"""What ``data pack`` and ``data inspect`` count in plans, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from roformer_dist.data.plan import Plan


def pack_counts(plans: Sequence[Plan], lengths: np.ndarray) -> dict[str, Any]:
    """The numbers of the closing table; ``lengths`` are the documents' (int64 ``[documents]``)."""
    document = np.concatenate([plan.document for plan in plans])
    ends = np.concatenate([plan.ends_document for plan in plans])
    placed = int(sum(plan.num_tokens for plan in plans))
    slots = sum(plan.num_rows * plan.seq_len for plan in plans)
    copies = np.bincount(document[ends], minlength=len(lengths))
    # A copy of a document is cut when it is in more than one piece.
    cut = np.bincount(document, minlength=len(lengths)) > copies
    longest = max(plan.seq_len for plan in plans)
    values: dict[str, Any] = {
        "rows": sum(plan.num_rows for plan in plans),
        "documents": len(lengths),
        "pieces": len(document),
        "documents_cut": int(cut.sum()),
        "documents_cut_that_fit_a_row": int((cut & (lengths <= longest)).sum()),
        "tokens": placed,
        "padding_percent": round(100 * (1 - placed / slots), 4),
        "upsampled_token_percent": round(100 * float(lengths[copies > 1] @ copies[copies > 1]) / placed, 2),
        "shard_groups": plans[0].num_groups,
    }
    if plans[0].method == "bucket":
        values["buckets"] = [bucket_counts(plan, placed) for plan in plans]
    return values


def bucket_counts(plan: Plan, tokens: int) -> dict[str, Any]:
    """One bucket's line; ``tokens`` are those of all buckets."""
    return {
        "seq_len": plan.seq_len,
        "rows": plan.num_rows,
        "documents": len(np.unique(plan.document)),
        "tokens": plan.num_tokens,
        "token_percent": round(100 * plan.num_tokens / tokens, 2),
        "padding_percent": round(100 * plan.padding, 4),
    }


def octaves(lengths: np.ndarray, weights: np.ndarray | None = None) -> list[dict[str, int]]:
    """A histogram by powers of two: ``from`` (inclusive), ``below``, ``count``, ``tokens``."""
    if not len(lengths):
        return []
    weights = np.ones(len(lengths), np.int64) if weights is None else weights
    octave = np.frexp(lengths.astype(np.float64))[1]
    counts = np.bincount(octave, weights=weights)
    tokens = np.bincount(octave, weights=weights * lengths)
    return [
        {"from": 2 ** (k - 1), "below": 2**k, "count": int(counts[k]), "tokens": int(tokens[k])}
        for k in range(int(octave.min()), len(counts))
    ]


def row_fill(plans: Sequence[Plan]) -> list[dict[str, float | int]]:
    """How full the rows are: a histogram over tenths, and completely full rows by themselves."""
    filled = [np.add.reduceat(plan.length, plan.row_offsets[:-1]) for plan in plans]
    share = np.concatenate([tokens * 10 // plan.seq_len for plan, tokens in zip(plans, filled)])
    counts = np.bincount(share, minlength=11)
    return [{"from_percent": 10 * tenth, "rows": int(counts[tenth])} for tenth in range(11)]
