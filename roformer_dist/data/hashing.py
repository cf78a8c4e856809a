"""Counter-based random numbers: every draw is a pure function of (key, counter), vectorised.

No generator state exists, so no state can be lost, shared or advanced twice.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, a bijection of 64-bit integers."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def absorb(state: np.ndarray, part: np.ndarray) -> np.ndarray:
    """``hash64`` with one more part, given ``hash64`` of the parts before it; uint64, broadcast."""
    return _mix((state + _GOLDEN) ^ _mix(part.astype(np.uint64) + _GOLDEN))


def hash64(*parts: int | np.ndarray) -> np.ndarray:
    """64 well-mixed bits for each combination of ``parts`` (broadcast), uint64.

    Negative integers are taken modulo 2**64.
    """
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        word = part if isinstance(part, np.ndarray) else np.array([part % 2**64], dtype=np.uint64)
        state = absorb(state, word)
    return state


def uniform(bits: np.ndarray) -> np.ndarray:
    """Float64 in [0, 1) from 64 random bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
