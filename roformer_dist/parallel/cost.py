"""PURE: bytes that a rank sends for one attention layer, by formula; ``bench attention`` counts the same at Comm.

T tokens of a row, U = ulysses_size, G = ring_size, S = T / (U G) tokens of a rank, N query heads, M key/value
heads, n_i and m_i those of rank i of an all-to-all (m_i counts a key/value head on each rank that uses it).
All figures are for one row and one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from roformer_dist.batch import MaskSpec
from roformer_dist.parallel.heads import HeadShare
from roformer_dist.parallel.hops import plan_hops
from roformer_dist.parallel.zigzag import deal

SUM_BYTES = 4  # gradients of keys and values travel in float32
POSITION_BYTES = 8  # a bias is made from the positions of all tokens, int64


@dataclass(frozen=True)
class Sent:
    """Bytes that leave one rank."""

    forward: int
    backward: int

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.forward + other.forward, self.backward + other.backward)


def ulysses_sent(
    rank: int, tokens: int, rounds: list[list[HeadShare]], *, head_dim: int, itemsize: int, parts: int = 1
) -> Sent:
    """What rank ``rank`` of an all-to-all sends; ``tokens`` are S, ``rounds`` the heads of each round and rank.

    For one part:

    Forward: q, k, v of the others' heads, ``S D sum_{i != rank} (n_i + 2 m_i)``, and what its own heads
    give for the others' tokens, ``S D (U - 1) n_rank``. Backward: dout one way, dq, dk, dv the other;
    in chunks q, k, v and out once more. With even heads each way ``(2 + 2 M / N) T N D (U - 1) / U^2``.
    Attention in parts has a q and a k for each of them, one v and one out.
    """
    forward = backward = 0
    for shares in rounds:
        n_own, m_own = len(shares[rank].queries), len(shares[rank].keys)
        n_others = sum(len(share.queries) for share in shares) - n_own
        m_others = sum(len(share.keys) for share in shares) - m_own
        inputs_others = parts * n_others + (parts + 1) * m_others
        inputs_own = parts * n_own + (parts + 1) * m_own
        forward += inputs_others + (len(shares) - 1) * n_own
        again = inputs_others + n_others if len(rounds) > 1 else 0
        backward += n_others + again + (len(shares) - 1) * inputs_own
    unit = tokens * head_dim * itemsize
    return Sent(unit * forward, unit * backward)


def ring_tokens(
    lengths: list[int], size: int, *, causal: bool, window: int | None = None
) -> list[tuple[int, int]]:
    """For each rank of a ring, ``(tokens whose keys it sends, tokens whose keys it receives)``."""
    mask = MaskSpec.from_lengths(lengths, causal=causal, window=window)
    holdings = deal([np.array(lengths, dtype=np.int64)], size)
    plans = [plan_hops(holdings, rank, mask)[1:] for rank in range(size)]
    return [(sum(hop.num_sent for hop in hops), sum(hop.num_received for hop in hops)) for hops in plans]


def ring_sent(tokens_sent: int, tokens_received: int, kv_heads: int, *, head_dim: int, itemsize: int) -> Sent:
    """K and V forward and again backward; dK and dV of what was received go back in float32.

    Of one causal document, rank r of G sends ``U S (r + (G - 1 - r) / 2)`` tokens, on average
    ``3/4 (G - 1) U S``; attending both ways ``(G - 1) U S``; with a window w within a piece ``2 (w - 1)``.
    """
    keys = 2 * kv_heads * head_dim * tokens_sent * itemsize
    return Sent(keys, keys + 2 * kv_heads * head_dim * tokens_received * SUM_BYTES)


def mesh_sent(
    ulysses_size: int,
    ring: list[tuple[int, int]],
    rounds: list[list[HeadShare]],
    tokens: int,
    *,
    head_dim: int,
    itemsize: int,
    parts: int = 1,
    biased: bool = False,
) -> list[Sent]:
    """What each rank of a sequence's mesh sends, in the order of ``sp_rank``.

    Args:
        ulysses_size: U.
        ring: what ``ring_tokens`` says of each rank of the ring.
        rounds: ``spread_heads`` over the U ranks.
        tokens: S.
        head_dim: D.
        itemsize: bytes of an element of q, k and v.
        parts: of attention in parts, which only Ulysses carries.
        biased: a bias needs the positions of the others' tokens, gathered once, forward.
    """
    others = ulysses_size * len(ring) - 1
    positions = Sent(POSITION_BYTES * tokens * others if biased else 0, 0)
    sent = []
    for tokens_sent, tokens_received in ring:
        for rank in range(ulysses_size):
            total = positions + ulysses_sent(
                rank, tokens, rounds, head_dim=head_dim, itemsize=itemsize, parts=parts
            )
            for shares in rounds:
                slots = len(shares[rank].slots)
                total += ring_sent(tokens_sent, tokens_received, slots, head_dim=head_dim, itemsize=itemsize)
            sent.append(total)
    return sent
