"""Mixtures: which source each draw takes, by exact integer quotas, and how many it took before.

A mixture repeats one pattern of ``sum(quotas)`` draws, in which source ``s`` occurs ``quotas[s]`` times.
The pattern is a level schedule: after any number of draws, each source has been drawn within one of its
share. So every step has the weights that were asked for, not only the average of many steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd

import numpy as np

BLOCK = 10_000  # weights of up to four decimals that sum to 1 are met exactly


def quotas_of(weights: Sequence[float], block: int = BLOCK) -> list[int]:
    """Integers in proportion to ``weights`` that sum to ``block`` (largest remainder; ties: listed first).

    Weights count as the decimal numbers that they print as. A weight too small for one draw in ``block``
    gets 0.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [block * weight / sum(exact) for weight in exact]
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda s: quotas[s] - shares[s])
    for source in by_remainder[: block - sum(quotas)]:
        quotas[source] += 1
    return quotas


class Mixture:
    """The source of each draw; stateless, for any draw.

    The pattern is that of the quota method (Balinski and Young, 1975): draw ``t`` goes to the source, of
    those behind their share (``count * block < quota * (t + 1)``), whose next draw is due first (the
    smallest ``(count + 1) / quota``; ties: listed first).

    Args:
        quotas: how often each source occurs in a block, at least 1 each; divided by what they have in
            common, which does not change the pattern.
    """

    def __init__(self, quotas: Sequence[int]) -> None:
        assert min(quotas) > 0, "each source needs a quota"
        common = gcd(*quotas)
        self.quotas = np.array(quotas, dtype=np.int64) // common
        self.block = int(self.quotas.sum())
        self._source, self._count = _pattern(self.quotas.tolist(), self.block)

    def draw(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each draw, and how often that source was drawn before; int64, as ``numbers``."""
        blocks, index = np.divmod(numbers, self.block)
        source = self._source[index]
        return source, blocks * self.quotas[source] + self._count[index]

    def counts(self, number: int) -> np.ndarray:
        """How often each source is drawn before draw ``number``, int64 ``[sources]``."""
        blocks, index = divmod(number, self.block)
        return blocks * self.quotas + np.bincount(self._source[:index], minlength=len(self.quotas))


def _pattern(quotas: list[int], block: int) -> tuple[np.ndarray, np.ndarray]:
    """The source of each draw of a block, and how often it was drawn before in the block."""
    source, before = np.empty(block, dtype=np.int64), np.empty(block, dtype=np.int64)
    counts = [0] * len(quotas)
    for draw in range(block):
        behind = (s for s, quota in enumerate(quotas) if counts[s] * block < quota * (draw + 1))
        chosen = min(behind, key=lambda s: (counts[s] + 1) / quotas[s])
        source[draw], before[draw] = chosen, counts[chosen]
        counts[chosen] += 1
    return source, before
