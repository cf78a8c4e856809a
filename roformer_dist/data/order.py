"""The order of a plan's rows: two keyed permutations for each epoch, computed for any place without state.

The rows of a source are numbered as they are drawn. Number ``n`` is in epoch ``n // num_rows``, and an
epoch has every row once. It permutes the plan's shard groups, takes them in windows of ``plan.window``,
and permutes the rows of each window: a training that reads remote shards needs those of one window at a
time. Nothing is built or stored but prefix sums over shard groups.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from roformer_dist.data.hashing import absorb, hash64

_ROUNDS = 6


class RowOrder:
    """Which row of a plan is drawn when.

    Args:
        group_offsets: int64 ``[groups + 1]``, the rows of each shard group; groups may be empty.
        window: shard groups whose rows are mixed with each other.
        seed, source: what the order depends on; ``source`` tells plans apart.
    """

    def __init__(self, group_offsets: np.ndarray, window: int, *, seed: int, source: int) -> None:
        assert group_offsets[-1] > 0, "an order needs at least one row"
        self._group_offsets, self._window = group_offsets, window
        self._seed, self._source = seed, source
        self._num_rows = int(group_offsets[-1])
        self._layout = lru_cache(maxsize=2)(self._compute_layout)  # a step is in one epoch or across two

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The row drawn at each number, int64, same shape as ``numbers`` (int64, any values >= 0)."""
        epochs, index = np.divmod(numbers, self._num_rows)
        rows = np.empty_like(index)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] = self._rows_of_epoch(epoch, index[here])
        return rows

    def _rows_of_epoch(self, epoch: int, index: np.ndarray) -> np.ndarray:
        groups, firsts = self._layout(epoch)
        bounds = np.append(firsts[: -1 : self._window], self._num_rows)
        window = np.searchsorted(bounds, index, side="right") - 1
        first, size = bounds[window], bounds[window + 1] - bounds[window]
        key = hash64(self._seed, self._source, epoch, window + 1)
        place = first + permuted(index - first, size, key)
        at = np.searchsorted(firsts, place, side="right") - 1
        return self._group_offsets[groups[at]] + place - firsts[at]

    def _compute_layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The groups in the epoch's order, and the number of rows before each of them and after all."""
        count = len(self._group_offsets) - 1
        key = hash64(self._seed, self._source, epoch, 0)
        groups = permuted(np.arange(count), np.full(count, count), np.broadcast_to(key, count))
        sizes = np.diff(self._group_offsets)[groups]
        return groups, np.concatenate([[0], np.cumsum(sizes)])


def permuted(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Where each ``index`` goes in the permutation of ``range(size)`` that ``key`` names, int64.

    A Feistel network permutes the cells of a near-square grid that holds ``size`` of them; a value that
    falls outside is put through it again until it falls inside (cycle walking), which keeps it a
    permutation.

    Args:
        index, size: int64 ``[n]``, ``0 <= index < size``; each element is a permutation of its own.
        key: uint64 ``[n]``.
    """
    sizes = size.astype(np.uint64)
    height = np.ceil(np.sqrt(sizes)).astype(np.uint64)
    width = (sizes + height - np.uint64(1)) // height
    values = _feistel(index.astype(np.uint64), key, height, width)
    while len(again := np.flatnonzero(values >= sizes)):
        values[again] = _feistel(values[again], key[again], height[again], width[again])
    return values.astype(np.int64)


def _feistel(values: np.ndarray, key: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """A permutation of the integers below ``height * width``."""
    row, column = np.divmod(values, width)
    for number in range(_ROUNDS):
        round_key = absorb(key, np.array([number]))
        # Reduced before adding, so that the sum cannot wrap around 2**64.
        if number % 2 == 0:
            row = (row + absorb(round_key, column) % height) % height
        else:
            column = (column + absorb(round_key, row) % width) % width
    return row * width + column
