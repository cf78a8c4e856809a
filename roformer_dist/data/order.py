"""The order of rows: a keyed permutation for each epoch, computed for any slot without state.

A slot is the running number of a row in the whole training. Slot ``s`` belongs to epoch
``s // num_rows``, and within an epoch every row comes exactly once.
"""

from __future__ import annotations

from math import isqrt

import numpy as np

from roformer_dist.data.hashing import absorb, hash64

_ROUNDS = 6


def rows_of_slots(slots: np.ndarray, *, num_rows: int, seed: int) -> np.ndarray:
    """The row at each slot, int64, same shape as ``slots`` (int64, any values >= 0).

    A Feistel network permutes the cells of the smallest near-square grid that holds ``num_rows``; a
    value that falls outside is put through it again until it falls inside (cycle walking), which
    keeps it a permutation. Slots of several epochs may be asked for at once.
    """
    assert num_rows > 0, "an order needs at least one row"
    epochs, index = np.divmod(np.asarray(slots, dtype=np.int64), num_rows)
    height = isqrt(num_rows - 1) + 1
    width = -(-num_rows // height)
    keys = hash64(seed, np.arange(_ROUNDS)[:, None], epochs[None])
    values = _feistel(index.astype(np.uint64), keys, height, width)
    while (outside := values >= num_rows).any():
        values[outside] = _feistel(values[outside], keys[:, outside], height, width)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, height: int, width: int) -> np.ndarray:
    """A permutation of the integers below ``height * width``; ``keys`` is uint64 ``[rounds, n]``."""
    rows, columns = np.uint64(height), np.uint64(width)
    row, column = np.divmod(values, columns)
    for number, key in enumerate(keys):
        # Reduced before adding, so that the sum cannot wrap around 2**64.
        if number % 2 == 0:
            row = (row + absorb(key, column) % rows) % rows
        else:
            column = (column + absorb(key, row) % columns) % columns
    return row * columns + column
