"""PURE: a document's visible region as rectangles and triangles that a plain flash kernel can compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from roformer_dist.batch import visible_distances


@dataclass(frozen=True)
class Block:
    """Queries ``q_start:q_stop`` and keys ``k_start:k_stop`` of one document.

    ``full``: every query sees every key. ``lower``: query t sees keys s <= t (counted from the block's
    corner, top-left). ``upper``: query t sees keys s >= t; a square.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    shape: Literal["full", "lower", "upper"]


def visible_blocks(
    q_len: int,
    k_len: int,
    offset: int,
    *,
    causal: bool,
    window: int | None,
    min_distance: int | None = None,
) -> list[Block]:
    """Blocks that tile exactly the visible (query, key) pairs of a document, each pair once.

    Query t stands at position ``t + offset`` in the keys' counting. It sees keys ``low(t) <= s < high(t)``,
    where both bounds are constant or move by one with t; so a run of queries sees one rectangle, a
    triangle above it and a triangle below it.
    """
    assert window is None or window > 0, f"a window of {window} positions"
    nearest, _ = visible_distances(causal=causal, window=window, min_distance=min_distance)
    high = None if nearest is None else offset - nearest + 1
    if window is None or high is None:
        return _band(0, q_len, k_len, low=None, high=high)
    low = offset - window + 1
    # At most as many queries as have a key in common, so that the triangles do not overlap.
    longest_run = min(window, high - low)
    if longest_run <= 0:
        return []
    blocks: list[Block] = []
    # While the lower bound lies before the first key, it is no bound; one run covers those queries.
    start = min(max(0, -low), q_len)
    if start:
        blocks += _band(0, start, k_len, low=None, high=high)
    while start < q_len and start + low < k_len:
        stop = min(start + longest_run, q_len)
        blocks += _band(start, stop, k_len, low=low, high=high)
        start = stop
    return blocks


def _band(q_start: int, q_stop: int, k_len: int, *, low: int | None, high: int | None) -> list[Block]:
    """Queries t of one run, which see keys ``t + low <= s < t + high`` (None: unbounded)."""
    if high is not None:
        q_start = max(q_start, 1 - high)
    if q_start >= q_stop or k_len == 0:
        return []
    # The rectangle that every query of the run sees; the last query bounds it below, the first above.
    first_full = 0 if low is None else q_stop - 1 + low
    last_full = k_len if high is None else q_start + high - 1
    blocks = []
    if min(last_full, k_len) > first_full:
        blocks.append(Block(q_start, q_stop, first_full, min(last_full, k_len), "full"))
    if high is not None and last_full < k_len:
        stop = min(q_stop - 1 + high, k_len)
        blocks.append(Block(q_start, q_stop, last_full, stop, "lower"))
    if low is not None:
        corner = q_start + low
        size = min(first_full, k_len) - corner
        if size > 0:
            blocks.append(Block(q_start, q_start + size, corner, corner + size, "upper"))
    return blocks
