"""Best-fit decreasing for integer sizes, and filling what room it leaves.

Cutting only where it pays follows Ding et al., "Fewer Truncations Improve Language Modeling" (2024):
best-fit packing keeps documents whole that fit a row.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

Segments = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # row, item, start, length


def best_fit(lengths: np.ndarray, seq_len: int, max_padding: float) -> Segments:
    """Rows of ``seq_len`` for items of ``lengths`` (int64 ``[items]``, at least 1 each).

    Each full ``seq_len`` of an item is a row of its own. What remains of it is placed, longest first,
    in the row with the least room that holds it. While the padding is above ``max_padding``, the
    emptiest rows are given up and what they hold is cut to fill the largest rooms of the others.
    """
    full, rest = np.divmod(lengths, seq_len)
    whole = np.repeat(np.arange(len(lengths)), full)
    whole_start = (np.arange(len(whole)) - np.repeat(np.cumsum(full) - full, full)) * seq_len
    item = np.flatnonzero(rest)
    item = item[np.argsort(-rest[item], kind="stable")]
    row, count = place(rest[item], seq_len)
    start, length = full[item] * seq_len, rest[item]
    allowed = _allowed_rows(int(lengths.sum()), seq_len, max_padding) - len(whole)
    if count > allowed:
        row, item, start, length = _fill((row, item, start, length), seq_len, count, allowed)
    return (
        np.concatenate([np.arange(len(whole)), row + len(whole)]),
        np.concatenate([whole, item]),
        np.concatenate([whole_start, start]),
        np.concatenate([np.full(len(whole), seq_len), length]),
    )


def _allowed_rows(tokens: int, seq_len: int, max_padding: float) -> int:
    """The most rows that ``tokens`` may take; at least what they need."""
    needed = -(-tokens // seq_len)
    return max(needed, int(tokens / (seq_len * (1 - max_padding)))) if max_padding < 1 else 2**62


def place(sizes: np.ndarray, seq_len: int) -> tuple[np.ndarray, int]:
    """The row of each size (sorted, longest first; 1 to ``seq_len - 1``) and how many rows there are.

    Items of equal size are placed together: each of the fullest rows with room takes as many as it
    holds, as one after the other would. So the number of steps is bounded by the distinct sizes and
    rooms, not by the items.
    """
    values, counts = np.unique(sizes, return_counts=True)
    rooms: list[int] = []  # the keys of by_room, sorted
    by_room: dict[int, list[int]] = {}
    placed: list[int] = []
    num_rows = 0

    def put(room: int, rows: list[int]) -> None:
        if room and rows:
            if room not in by_room:
                insort(rooms, room)
                by_room[room] = []
            by_room[room] += rows

    for size, count in zip(values[::-1].tolist(), counts[::-1].tolist()):
        while count:
            found = bisect_left(rooms, size)
            if found < len(rooms):
                room = rooms[found]
                rows = by_room[room]
            else:
                room = seq_len
                rows = list(range(num_rows, num_rows + -(-count // (room // size))))
                num_rows += len(rows)
            each = room // size
            used, last = divmod(count, each)
            if used >= len(rows):
                used, last = len(rows), 0
            taken, partly = rows[:used], rows[used : used + bool(last)]
            placed += taken * each + partly * last
            count -= used * each + last
            if found < len(rooms):
                del rows[: used + bool(last)]
                if not rows:
                    del by_room[room], rooms[found]
            put(room - each * size, taken)
            put(room - last * size, partly)
    return np.array(placed, dtype=np.int64), num_rows


def _fill(segments: Segments, seq_len: int, rows: int, allowed: int) -> Segments:
    """``segments`` in ``allowed`` rows: the emptiest ``rows - allowed`` are dissolved into the others."""
    row, item, start, length = segments
    room = seq_len - np.bincount(row, weights=length, minlength=rows).astype(np.int64)
    emptiest = np.argsort(-room, kind="stable")
    given_up, others = emptiest[: rows - allowed], emptiest[rows - allowed :]
    moved = np.isin(row, given_up)
    # The moved items, joined, are cut where an item begins and where a room is full.
    firsts = np.concatenate([[0], np.cumsum(length[moved])])
    filled = np.concatenate([[0], np.cumsum(room[others])])
    begins = np.union1d(firsts[:-1], filled[filled < firsts[-1]])
    source = np.searchsorted(firsts, begins, side="right") - 1
    target = others[np.searchsorted(filled, begins, side="right") - 1]
    renumbered = np.cumsum(~np.isin(np.arange(rows), given_up)) - 1
    return (
        renumbered[np.concatenate([row[~moved], target])],
        np.concatenate([item[~moved], item[moved][source]]),
        np.concatenate([start[~moved], start[moved][source] + begins - firsts[source]]),
        np.concatenate([length[~moved], np.diff(np.append(begins, firsts[-1]))]),
    )
