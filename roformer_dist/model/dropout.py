"""Dropout whose mask is a pure function of (seed, token, site, channel): the same at any mesh.

A generator would give every layout of ranks, micro-batches and recomputations another mask. Here
each token carries a number of its own (``Batch.counters``), and a hash of it decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Constants of splitmix64 (Steele et al. 2014), as signed 64-bit integers.
_GOLDEN = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def mix64(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64 values (wrapping arithmetic)."""
    x = (x ^ _logical_shift(x, 30)) * _MIX_1
    x = (x ^ _logical_shift(x, 27)) * _MIX_2
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class CounterDropout:
    """Dropout at one site of the network.

    Args:
        probability: share of channels set to zero; the others are scaled by ``1 / (1 - probability)``.
        seed: the run's seed.
        site: a number that no other site of the network uses.
    """

    def __init__(self, probability: float, *, seed: int, site: int) -> None:
        self.probability = probability
        # Hashing the pair keeps sites of nearby seeds apart.
        self.key = int(mix64(mix64(torch.tensor(seed * _GOLDEN % 2**62, device="cpu")) + site))

    def __call__(self, x: Tensor, counters: Tensor, *, training: bool) -> Tensor:
        """Drop channels of ``x`` ``[R, S, C]`` by ``counters`` int64 ``[R, S]``."""
        if not training or self.probability == 0:
            return x
        token = mix64(counters * _GOLDEN + self.key)
        channel = torch.arange(x.shape[-1], device=x.device) * _GOLDEN
        draws = _logical_shift(mix64(token[..., None] + channel), 33)
        dropped = draws < round(self.probability * 2**31)
        return x.masked_fill(dropped, 0) / (1 - self.probability)
