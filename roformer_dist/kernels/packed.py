"""PURE: a mask as the calls that a packed ("varlen") flash kernel can compute.

Such a kernel takes documents as prefix sums and one band for all of them, counted from the documents' *ends*
(bottom-right): query i of T sees key j of U when ``i + U - T - left <= j <= i + U - T + right``, -1 for no bound.
Ours counts from offsets. So a document is trimmed to what it can see, and documents of one band share a call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

from roformer_dist.batch import MaskSpec

UNBOUNDED = -1


@dataclass(frozen=True)
class Piece:
    """The part of a document that sees or is seen: queries and keys by place in the token axis."""

    q_start: int
    q_len: int
    k_start: int
    k_len: int


@dataclass
class PackedCall:
    """One call: documents that share a band."""

    left: int
    right: int
    pieces: list[Piece] = field(default_factory=list)

    @property
    def causal(self) -> bool:
        """What kernels have a fast path and a name for."""
        return (self.left, self.right) == (UNBOUNDED, 0)

    @property
    def lengths(self) -> tuple[list[int], list[int]]:
        """Queries and keys of each document."""
        return [p.q_len for p in self.pieces], [p.k_len for p in self.pieces]

    def covers(self, tokens_q: int, tokens_k: int) -> bool:
        """Whether the call takes all tokens in their order, so that nothing need be gathered."""
        q_lens, k_lens = self.lengths
        return (
            [p.q_start for p in self.pieces] == list(accumulate(q_lens[:-1], initial=0))
            and [p.k_start for p in self.pieces] == list(accumulate(k_lens[:-1], initial=0))
            and (sum(q_lens), sum(k_lens)) == (tokens_q, tokens_k)
        )


def packed_calls(mask: MaskSpec) -> list[PackedCall]:
    """Calls that together compute every visible (query, key) pair once; each query and key is in at most one."""
    calls: dict[tuple[int, int], PackedCall] = {}
    loose: list[Piece] = []
    for document in mask.documents:
        banded = _piece_and_band(document, *mask.distances)
        if banded is None:
            continue
        piece, left, right = banded
        if _binds(left, piece.k_len) or _binds(right, piece.q_len):
            calls.setdefault((left, right), PackedCall(left, right)).pieces.append(piece)
        else:
            loose.append(piece)
    # A document that sees itself whole under any band fits into a call that is made anyway.
    for piece in loose:
        home = next((c for c in calls.values() if _fits(piece, c)), None)
        if home is None:
            home = calls.setdefault((UNBOUNDED, UNBOUNDED), PackedCall(UNBOUNDED, UNBOUNDED))
        home.pieces.append(piece)
    for call in calls.values():
        call.pieces.sort(key=lambda p: (p.q_start, p.k_start))
    return list(calls.values())


def _piece_and_band(
    document: tuple[int, int, int, int, int], nearest: int | None, farthest: int | None
) -> tuple[Piece, int, int] | None:
    """The visible part of a document with its (left, right), each -1 or at least 0; None when nothing is visible."""
    q_start, q_len, k_start, k_len, offset = document
    if nearest is not None and farthest is not None and nearest > farthest:
        return None
    # Query t sees keys t + offset - farthest to t + offset - nearest. The last queries may be past all keys ...
    if farthest is not None:
        q_len = min(q_len, k_len + farthest - offset)
    # ... and the last keys beyond what the last query sees.
    if nearest is not None:
        k_len = min(k_len, q_len + offset - nearest)
    if q_len <= 0 or k_len <= 0:
        return None
    piece = Piece(q_start, q_len, k_start, k_len)
    left = UNBOUNDED if farthest is None else farthest - offset + k_len - q_len
    right = UNBOUNDED if nearest is None else offset - nearest - k_len + q_len
    return piece, left, right


def _binds(bound: int, length: int) -> bool:
    return bound != UNBOUNDED and bound < length - 1


def _fits(piece: Piece, call: PackedCall) -> bool:
    return not _binds(call.left, piece.k_len) and not _binds(call.right, piece.q_len)
