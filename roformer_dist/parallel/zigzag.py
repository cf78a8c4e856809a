"""PURE: which tokens of which document each rank of a ring holds; equal counts, balanced attention.

A causal query works in proportion to its position, so every document is laid out in a zigzag of its
own: its ranks take pieces from the front in turn and then, in the opposite order, pieces from the back.
How many tokens of a document each rank takes follows from dealing the row's documents, longest first,
to the ranks like cards: token by token while documents are long, so that all ranks share them evenly,
and in strips of ``strip_length`` tokens where they are short, so that they stay on few ranks. Dealing
in descending order makes what the ranks get in each round nearly alike, and alternate rounds go back.

Shapes: D documents of a row, E entries (document, rank) with at least one token, P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Integers = np.ndarray  # of int64 throughout

# A rank takes at least this many strips of short documents: the more, the closer the sums of work.
STRIPS_PER_RANK = 128
LONGEST_STRIP = 128


@dataclass(frozen=True)
class Holding:
    """What one rank holds, document by document in the order of the row, front before back.

    Attributes:
        document: ``[n]`` ascending numbers of the documents it has tokens of.
        order: ``[n]`` the rank's turn in each document: 0 holds the first and the last piece.
        front, back: ``[n, 2]`` start and stop of the pieces, as positions in the document; a piece
            may be empty.
        local: ``[n + 1]`` where each document's tokens begin among the rank's own.
    """

    document: Integers
    order: Integers
    front: Integers
    back: Integers
    local: Integers

    def places(self, document_starts: Integers) -> Integers:
        """Every token's place in the rows, in local order, given where each document starts."""
        starts = document_starts[self.document]
        pieces = np.stack([self.front + starts[:, None], self.back + starts[:, None]], axis=1).reshape(-1, 2)
        return ranges(pieces[:, 0], pieces[:, 1])

    def causal_work(self) -> int:
        """(query, key) pairs that causal attention computes for this rank's queries."""
        pieces = np.concatenate([self.front, self.back])
        pairs = pieces * (pieces + 1) // 2
        return int((pairs[:, 1] - pairs[:, 0]).sum())


def ranges(starts: Integers, stops: Integers) -> Integers:
    """``start, start + 1, … stop - 1`` of every pair, one after the other."""
    lengths = stops - starts
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)


def strip_length(local_tokens: int) -> int:
    """Tokens of a short document that a rank takes at a time, when it holds ``local_tokens`` of a row."""
    return min(max(1, local_tokens // STRIPS_PER_RANK), LONGEST_STRIP)


def deal(rows: list[Integers], size: int) -> list[Holding]:
    """What each of ``size`` ranks holds of ``rows`` of documents.

    Args:
        rows: the document lengths of each row, in order; all rows have the same sum, a multiple of ``size``.
        size: ranks of the ring.

    Returns:
        One holding a rank; documents are numbered through all rows, and each rank has the same number
        of tokens of each row.
    """
    tables, documents = [], 0
    for lengths in rows:
        table = _entries(np.asarray(lengths, dtype=np.int64), size)
        table[:, 0] += documents
        tables.append(table)
        documents += len(lengths)
    entries = np.concatenate(tables)
    by_rank = entries[np.lexsort((entries[:, 0], entries[:, 1]))]
    cuts = np.searchsorted(by_rank[:, 1], np.arange(size + 1))
    return [_holding(by_rank[start:stop]) for start, stop in pairwise(cuts)]


def _holding(entries: Integers) -> Holding:
    front, back = entries[:, 3:5], entries[:, 5:7]
    counts = (front[:, 1] - front[:, 0]) + (back[:, 1] - back[:, 0])
    return Holding(entries[:, 0], entries[:, 2], front, back, np.concatenate([[0], np.cumsum(counts)]))


def _entries(lengths: Integers, size: int) -> Integers:
    """``[E, 7]``: document, rank, order, front start and stop, back start and stop; of one row."""
    total = int(lengths.sum())
    assert total % size == 0, f"{total} tokens over {size} ranks"
    document, rank, count = _shares(lengths, size)
    # Entries of one document stand together, in the order in which its ranks were dealt to.
    first = np.searchsorted(document, document)  # the entry with which each entry's document begins
    order = np.arange(len(document)) - first
    # An odd token goes to the front in one document and to the back in the next, for balance.
    in_front = (count + (document & 1)) // 2
    in_back = count - in_front
    front_stop, back_taken = (_running(part, first) for part in (in_front, in_back))
    back_start = lengths[document] - back_taken
    return np.stack(
        [document, rank, order, front_stop - in_front, front_stop, back_start, back_start + in_back], axis=1
    )


def _running(values: Integers, first: Integers) -> Integers:
    """Inclusive sums that begin anew with each document."""
    sums = np.cumsum(values)
    return sums - (sums - values)[first]


def _shares(lengths: Integers, size: int) -> tuple[Integers, Integers, Integers]:
    """How many tokens of each document each rank takes: documents ascending, ranks in the order of dealing."""
    total, strip = int(lengths.sum()), strip_length(int(lengths.sum()) // size)
    longest_first = np.argsort(-lengths, kind="stable")
    stream = np.concatenate([[0], np.cumsum(lengths[longest_first])])
    # Long documents would fill more than a round of strips. The round of single tokens that they end
    # in is filled up from the next documents.
    tokens_of_long = int(lengths[lengths >= strip * size].sum())
    by_token = -(-tokens_of_long // size) * size
    rounds = (total - by_token) // (strip * size)
    by_strip = by_token + rounds * strip * size
    rest = (total - by_strip) // size
    one = _dealt_by_token(stream, by_token, size)
    cuts = np.concatenate(
        [
            np.arange(by_token, by_strip, strip),
            by_strip + np.arange(size) * rest if rest else [],
            stream[(stream > by_token) & (stream < total)],
        ]
    )
    starts = np.unique(cuts.astype(np.int64))
    strip_number = np.where(
        starts < by_strip,
        (starts - by_token) // strip,
        rounds * size + (starts - by_strip) // max(rest, 1),
    )
    turn, place = strip_number // size, strip_number % size
    two = np.stack(
        [
            np.searchsorted(stream, starts, side="right") - 1,
            np.where(turn % 2, size - 1 - place, place),
            np.diff(np.append(starts, total)),
        ]
    )
    position, rank, count = np.concatenate([one, two], axis=1)
    # A rank that a document comes to twice takes both shares as one, at the turn of the first.
    document = longest_first[position]
    key, dealt_first, which = np.unique(document * size + rank, return_index=True, return_inverse=True)
    count = np.bincount(which, weights=count, minlength=len(key)).astype(np.int64)
    arranged = np.lexsort((dealt_first, key // size))
    return (key // size)[arranged], (key % size)[arranged], count[arranged]


def _dealt_by_token(stream: Integers, end: int, size: int) -> Integers:
    """``[3, E]`` place in the stream, rank and count for the tokens before ``end``, dealt one at a time."""
    inside = np.flatnonzero(stream[:-1] < end)
    start, stop = stream[inside], np.minimum(stream[inside + 1], end)
    ranks = (start[:, None] + np.arange(size)) % size  # the first token's rank first
    # The k-th rank in turn gets the tokens k, k + size, k + 2 size … of the document.
    counts = (stop - start)[:, None] + size - 1 - np.arange(size)
    counts //= size
    position = np.broadcast_to(inside[:, None], ranks.shape)
    taken = counts > 0
    return np.stack([position[taken], ranks[taken], counts[taken]])
