"""Dealing documents to the ranks of a ring: every token once, equal counts, balanced attention, in seconds."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roformer_dist.parallel.zigzag import Holding, deal, ranges, strip_length


def places(holdings: list[Holding], lengths: np.ndarray) -> list[np.ndarray]:
    starts = np.cumsum(lengths) - lengths
    return [holding.places(starts) for holding in holdings]


def imbalance(lengths: np.ndarray, size: int) -> float:
    work = np.array([holding.causal_work() for holding in deal([lengths], size)], dtype=float)
    assert work.sum() == (lengths * (lengths + 1) // 2).sum()
    return float(work.max() / work.mean())


def documents(total: int, median: int, spread: float, seed: int) -> np.ndarray:
    """Lengths of a lognormal law, as corpora have them, that fill a row of ``total`` tokens."""
    generator = np.random.default_rng(seed)
    lengths = np.maximum(
        1, (median * np.exp(spread * generator.standard_normal(total // 20 + 10))).astype(int)
    )
    ends = np.cumsum(lengths)
    count = int(np.searchsorted(ends, total))
    return np.append(lengths[:count], total - (ends[count - 1] if count else 0))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=40), min_size=1, max_size=3),
    size=st.integers(1, 17),
)
def test_every_token_once_equal_counts_in_ascending_order(rows: list[list[int]], size: int) -> None:
    longest = max(sum(row) for row in rows)
    total = -(-longest // size) * size
    padded = [np.array([*row, total - sum(row)], dtype=np.int64) for row in rows]
    holdings = deal(padded, size)
    lengths = np.concatenate(padded)
    held = places(holdings, lengths)
    assert np.array_equal(np.sort(np.concatenate(held)), np.arange(total * len(rows)))
    for holding, mine in zip(holdings, held):
        # The same number from each row, documents in order, tokens ascending in a document.
        per_row = np.bincount(mine // total, minlength=len(rows))
        assert (per_row == total // size).all()
        assert (np.diff(mine) > 0).all()
        assert (np.diff(holding.document) > 0).all()
        assert holding.local[-1] == len(mine)


def test_one_document_is_a_zigzag() -> None:
    held = places(deal([np.array([24])], 3), np.array([24]))
    assert [list(mine) for mine in held] == [
        [0, 1, 2, 3, 20, 21, 22, 23],
        [4, 5, 6, 7, 16, 17, 18, 19],
        [8, 9, 10, 11, 12, 13, 14, 15],
    ]


def test_short_documents_stay_on_few_ranks_and_long_ones_are_shared_by_all() -> None:
    lengths = np.array([64 * 8192 - 300 * 512, *[512] * 300])
    holdings = deal([lengths], 64)
    ranks = np.bincount(np.concatenate([holding.document for holding in holdings]))
    assert ranks[0] == 64
    # Strips of 64 tokens, and shorter ones for what they leave.
    assert np.median(ranks[1:]) == 8
    assert ranks[1:].max() <= 16


@pytest.mark.parametrize("size", [2, 8, 64, 1024])
@pytest.mark.parametrize("local", [8192, 8193])
def test_causal_work_of_one_document_is_balanced_within_two_percent(size: int, local: int) -> None:
    assert imbalance(np.array([size * local]), size) <= 1.02
    # A few tokens of padding are a document of their own.
    assert imbalance(np.array([size * local - size + 1, size - 1]), size) <= 1.02


# Median 8,100 tokens and a tail of 6 medians, as the quickstart's corpus; web text; books; short posts.
CORPORA = [(8100, 0.6), (8000, 1.0), (1000, 1.6), (8000, 1.8), (300, 1.0)]


@pytest.mark.parametrize("size", [2, 8, 64, 256])
@pytest.mark.parametrize("corpus", CORPORA, ids=str)
def test_causal_work_of_documents_is_balanced_within_five_percent(
    size: int, corpus: tuple[int, float]
) -> None:
    for seed in range(3):
        assert imbalance(documents(size * 8192, *corpus, seed), size) <= 1.05


@pytest.mark.parametrize("corpus", CORPORA, ids=str)
def test_a_thousand_ranks_and_eight_million_tokens_take_seconds(corpus: tuple[int, float]) -> None:
    lengths = documents(1024 * 8192, *corpus, 0)
    start = time.process_time()
    ratio = imbalance(lengths, 1024)
    assert ratio <= 1.05
    assert time.process_time() - start < 10


def test_plain_order_is_not_balanced() -> None:
    # The measure sees what it is for: contiguous cuts of a row leave the first rank almost idle.
    holding = deal([np.array([100])], 1)[0]
    assert holding.causal_work() == 5050
    halves = np.array([np.arange(50).sum() + 50, np.arange(50, 100).sum() + 50], dtype=float)
    assert halves.max() / halves.mean() > 1.4


def test_strips_are_a_share_of_what_a_rank_holds_within_bounds() -> None:
    assert [strip_length(tokens) for tokens in (1, 127, 8192, 2**20)] == [1, 1, 64, 128]


def test_ranges() -> None:
    assert ranges(np.array([3, 9, 5]), np.array([5, 9, 8])).tolist() == [3, 4, 5, 6, 7]
