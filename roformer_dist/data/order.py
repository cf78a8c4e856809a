"""The order of rows: a keyed permutation for each epoch, computed for any slot without state.

A slot is the running number of a row in the whole training. Slot ``s`` belongs to epoch
``s // num_rows``, and within an epoch every row comes exactly once.
"""

from __future__ import annotations

import numpy as np

from roformer_dist.data.hashing import hash64

_ROUNDS = 6


def rows_of_slots(slots: np.ndarray, *, num_rows: int, seed: int) -> np.ndarray:
    """The row at each slot, int64, same shape as ``slots`` (int64, any values >= 0).

    A Feistel network permutes the smallest even number of bits that holds ``num_rows``; a value that
    falls outside is put through it again until it falls inside (cycle walking), which keeps it a
    permutation. Slots of several epochs may be asked for at once.
    """
    assert num_rows > 0, "an order needs at least one row"
    epochs, index = np.divmod(np.asarray(slots, dtype=np.int64), num_rows)
    half = max(1, ((num_rows - 1).bit_length() + 1) // 2)
    values = _feistel(index.astype(np.uint64), epochs, seed, half)
    while True:
        outside = values >= num_rows
        if not outside.any():
            return values.astype(np.int64)
        values[outside] = _feistel(values[outside], epochs[outside], seed, half)


def _feistel(values: np.ndarray, epochs: np.ndarray, seed: int, half: int) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (hash64(seed, number, epochs, right) & mask)
    return (left << shift) | right
