"""What a cache asks of the ranks that share it; ``parallel.shared_cache`` is it. One rank alone asks nobody.

Shapes: T tokens of a read over all its sequences, t those of them that this rank computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from roformer_dist.kernels.attention import SequenceOps


class ReadShare(Protocol):
    """One rank's part of a read: positions by sequence, in the order of the read."""

    @property
    def tokens(self) -> Sequence[range]:
        """The tokens that this rank computes, t in all."""
        ...

    @property
    def kept(self) -> Sequence[range]:
        """Those of them whose keys and values stay on this rank."""
        ...

    def attention(self, positions: Sequence[np.ndarray]) -> SequenceOps:
        """Softmax attention of this rank's queries to the keys on all ranks.

        It is called with queries ``[1, t, N, D]``, this rank's keys and values, which stand at ``positions``
        (ascending, by sequence), and masks of which only what they say about distances counts.
        """
        ...

    def everyone(self, x: Tensor) -> Tensor:
        """``[t, ...]`` of every rank as ``[T, ...]`` in the order of the read, the same on all."""
        ...

    def sums(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of a tensor with one entry a sequence: the sum over the ranks with earlier tokens, and over all."""
        ...


class CacheRanks(Protocol):
    """Ranks that keep a cache together."""

    def room(self, tokens: int) -> int:
        """How many keys one rank keeps at most of a sequence of ``tokens``."""
        ...

    def share(self, spans: Sequence[range]) -> ReadShare:
        """This rank's part of a read of these tokens, one range a sequence."""
        ...

    def agree(self, tokens: Sequence[int]) -> None:
        """RuntimeError where ranks have chosen different tokens."""
        ...
