"""PURE: which heads each rank of an all-to-all attends with, also when the ranks do not divide them.

Query head i uses key/value head ``i // (N / M)`` (N query heads, M key/value heads). Each rank takes
neighbouring query heads, some ranks one more than others, and every key/value head that they use: one
that serves the queries of several ranks goes to each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import gcd


@dataclass(frozen=True)
class HeadShare:
    """What one rank attends with in one chunk.

    Attributes:
        queries: query heads.
        keys: key/value heads that travel to the rank, each once.
        slots: indices into ``keys``, one for each key/value head that the kernel is given. Kernels group
            query heads evenly; where the share cuts through groups, a key/value head takes several slots.
    """

    queries: range
    keys: range
    slots: tuple[int, ...]

    @property
    def is_even(self) -> bool:
        """Whether each key/value head takes one slot."""
        return len(self.slots) == len(self.keys)


def spread_heads(num_heads: int, num_kv_heads: int, size: int, chunks: int = 1) -> list[list[HeadShare]]:
    """``[chunk][rank]`` of ``chunks`` rounds over ``size`` ranks; each rank has a head in each round.

    Whole groups go to a rank where ``size`` allows it, so that no key/value head travels twice.
    """
    assert num_heads % num_kv_heads == 0, f"{num_heads} heads in {num_kv_heads} groups"
    assert size * chunks <= num_heads, f"{num_heads} heads for {chunks} chunks on {size} ranks"
    shares = [_split(heads, chunks) for heads in _split(range(num_heads), size)]
    group = num_heads // num_kv_heads
    return [[_share(shares[rank][chunk], group) for rank in range(size)] for chunk in range(chunks)]


def _split(heads: range, parts: int) -> list[range]:
    """Neighbouring parts whose sizes differ by one at most."""
    cuts = [heads.start + len(heads) * part // parts for part in range(parts + 1)]
    return [range(start, stop) for start, stop in pairwise(cuts)]


def _share(queries: range, group: int) -> HeadShare:
    keys = range(queries[0] // group, queries[-1] // group + 1)
    served = [sum(head // group == key for head in queries) for key in keys]
    # The widest even grouping: every slot serves as many query heads.
    width = gcd(*served)
    slots = [place for place, count in enumerate(served) for _ in range(count // width)]
    return HeadShare(queries, keys, tuple(slots))
