"""What a causal network keeps of tokens that it has read, so that it need not read them again.

Keys are kept as they are before the rotation and turned at every read, with the frequencies of the length at
hand: under a rule that depends on the length, keys rotated once would stand at angles that no query uses any more.

Sequences of different lengths are documents of one row: nothing is padded.

Shapes: T tokens of one read over all its sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from roformer_dist.batch import IGNORE_INDEX, Batch, MaskSpec
from roformer_dist.config.layers import LayerKind, layer_kind
from roformer_dist.kernels.attention import SequenceOps
from roformer_dist.model.cache_layers import FullStore, LinearStore, SlidingStore, Store
from roformer_dist.model.roformer import RoFormer
from roformer_dist.model.rotary import Phases
from roformer_dist.model.scores import PlainScores, Scores, Side, softmax_scores
from roformer_dist.model.sharing import CacheRanks, ReadShare


@dataclass(frozen=True)
class Piece:
    """The next tokens of one sequence.

    Attributes:
        sequence: its number in the cache.
        tokens: int64 ``[n]``, n > 0, on the network's device.
        extent: the length that a length-dependent rule goes by, at least the tokens read with these.
    """

    sequence: int
    tokens: Tensor
    extent: int


@dataclass(frozen=True)
class _Span:
    """A piece by its numbers: the places of its tokens in the sequence, and the positions of keys kept before."""

    sequence: int
    places: range
    extent: int
    held: np.ndarray


def _numbers(places: range) -> np.ndarray:
    return np.arange(places.start, places.stop)


class KVCache:
    """Keys and values of every softmax layer, and the state of every linear one, for several sequences.

    A full layer has room for ``capacities`` tokens, taken at its first read: ``2 M D`` numbers for each. A sliding
    layer keeps ``sliding_window - 1`` tokens, a linear layer ``M (D + 1) D`` numbers in float32, whatever the length.
    Ranks that keep the cache together have an equal part of the tokens each.

    Attributes:
        lengths: tokens read of each sequence.
    """

    def __init__(self, network: RoFormer, capacities: Sequence[int], ranks: CacheRanks | None = None) -> None:
        """
        Args:
            network: a causal model.
            capacities: tokens that may be read of each sequence.
            ranks: those that share the cache, and call ``read`` with the same pieces; None: this one alone.
        """
        self._network = network
        self._capacities = list(capacities)
        self._ranks = ranks
        self.lengths = [0] * len(self._capacities)
        # Positions of the keys that this rank keeps of each sequence.
        self._positions = [np.arange(0)] * len(self._capacities)
        model = network.config
        self._layers = [self._store(layer_kind(model, layer)) for layer in range(model.num_layers)]

    def _store(self, kind: LayerKind) -> Store:
        model, count = self._network.config, len(self._capacities)
        if kind == "linear":
            return LinearStore(count, model.linear_features)
        if kind == "sliding":
            assert model.sliding_window is not None, "refused with the configuration"
            return SlidingStore(count, model.sliding_window)
        return FullStore(kind, [self._ranks.room(n) if self._ranks else n for n in self._capacities])

    def forget(self, sequence: int) -> None:
        """Start a sequence anew."""
        self.lengths[sequence] = 0
        self._positions[sequence] = np.arange(0)
        for store in self._layers:
            store.forget(sequence)

    @torch.no_grad()
    def read(self, ops: SequenceOps, pieces: Sequence[Piece]) -> Tensor:
        """Features ``[T, hidden_size]`` of the pieces' tokens, one piece after the other; they are kept.

        Args:
            ops: how the network attends on one rank; ranks that share the cache have their own way.
            pieces: each of another sequence.

        Raises:
            ValueError: a piece is longer than the room that its sequence has left.
        """
        spans = []
        for piece in pieces:
            start = self.lengths[piece.sequence]
            stop = start + len(piece.tokens)
            if stop > self._capacities[piece.sequence]:
                raise ValueError(
                    f"sequence {piece.sequence}: {stop} tokens do not fit into a cache for "
                    f"{self._capacities[piece.sequence]}"
                )
            assert start < stop <= piece.extent, "a piece has tokens, inside the extent"
            held = self._positions[piece.sequence]
            spans.append(_Span(piece.sequence, range(start, stop), piece.extent, held))
        share = self._ranks.share([span.places for span in spans]) if self._ranks else None
        read = _Read(self._network, spans, share)
        scores = [store.scores(read) for store in self._layers]
        hidden = self._network(read.batch(pieces), ops, scores)[0]
        for span, positions in zip(spans, read.positions):
            self.lengths[span.sequence] = span.places.stop
            self._positions[span.sequence] = positions
        return hidden if share is None else share.everyone(hidden)


class _Read:
    """One forward: positions and masks of its queries, and of the keys of each kind of layer.

    Attributes:
        positions: those of the keys that this rank keeps of each sequence after this read, if it keeps all it saw.
    """

    def __init__(self, network: RoFormer, spans: Sequence[_Span], share: ReadShare | None) -> None:
        self.network, self.share = network, share
        self._spans = spans
        whole = [span.places for span in spans]
        self._tokens, kept = (whole, whole) if share is None else (share.tokens, share.kept)
        self.sequences = [span.sequence for span in spans]
        ends = list(accumulate(map(len, self._tokens)))
        self.cuts = [slice(end - len(places), end) for end, places in zip(ends, self._tokens)]
        starts = [cut.start - places.start for cut, places in zip(self.cuts, self._tokens)]
        self.new = [slice(places.start + at, places.stop + at) for places, at in zip(kept, starts)]
        self.positions = [np.concatenate([span.held, _numbers(new)]) for span, new in zip(spans, kept)]
        self.queries = self._side([_numbers(places) for places in self._tokens])
        self._kinds: dict[LayerKind, Scores] = {}
        self._ops: dict[LayerKind, SequenceOps] = {}

    def batch(self, pieces: Sequence[Piece]) -> Batch:
        """This rank's tokens."""
        parts = [
            piece.tokens[places.start - span.places.start : places.stop - span.places.start]
            for piece, span, places in zip(pieces, self._spans, self._tokens)
        ]
        tokens = torch.cat(parts)[None]
        positions = self.queries.position_ids
        return Batch(tokens, torch.full_like(tokens, IGNORE_INDEX), positions, positions, self._mask(None))

    def held(self, place: int) -> int:
        """See Read."""
        return len(self._spans[place].held)

    def within(self, place: int, window: int) -> int:
        """See Read."""
        positions, stop = self.positions[place], self._spans[place].places.stop
        return len(positions) - int(np.searchsorted(positions, stop - window + 1))

    def scores(self, kind: LayerKind) -> Scores:
        """See Read."""
        if kind not in self._kinds:
            self._kinds[kind] = self._make(kind)
        return self._kinds[kind]

    def ops(self, kind: LayerKind, ops: SequenceOps) -> SequenceOps:
        """See Read."""
        if self.share is None:
            return ops
        if kind not in self._ops:
            self._ops[kind] = self.share.attention(self._keys(self._window(kind)))
        return self._ops[kind]

    def _window(self, kind: LayerKind) -> int | None:
        return self.network.config.sliding_window if kind == "sliding" else None

    def _make(self, kind: LayerKind) -> Scores:
        window = self._window(kind)
        mask = self._mask(window)
        if kind == "no_position":
            return PlainScores(mask)
        keys = self._side(self._keys(window))
        bias = self.network.positions.score_bias(self.queries.position_ids, keys.position_ids, causal=True)
        return softmax_scores(self.network.config, mask, self.queries, keys, bias)

    def _keys(self, window: int | None) -> list[np.ndarray]:
        """Positions of this rank's keys that the read sees, by sequence."""
        if window is None:
            return self.positions
        firsts = [span.places.start - window + 1 for span in self._spans]
        return [x[np.searchsorted(x, first) :] for x, first in zip(self.positions, firsts)]

    def _mask(self, window: int | None) -> MaskSpec:
        """Queries on one rank over its keys and among themselves; for several ranks, what they say of distances."""
        keys = self._keys(window)

        def integers(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.network.embedding.weight.device)

        q_lens, k_lens = [len(places) for places in self._tokens], [len(x) for x in keys]
        return MaskSpec(
            cu_seqlens_q=integers(list(accumulate(q_lens, initial=0))),
            cu_seqlens_k=integers(list(accumulate(k_lens, initial=0))),
            max_q=max(q_lens),
            max_k=max(k_lens),
            causal=True,
            q_offset=integers([places.start for places in self._tokens]),
            k_offset=integers([int(x[0]) if len(x) else 0 for x in keys]),
            window=window,
        )

    def _side(self, positions: Sequence[np.ndarray]) -> Side:
        device = self.network.embedding.weight.device
        position_ids = torch.from_numpy(np.concatenate(positions)).to(device)[None]
        if self.network.config.position.kind != "rotary":
            return Side(position_ids, None)
        return Side(
            position_ids, self._turning([len(x) for x in positions], [span.extent for span in self._spans])
        )

    def _turning(self, counts: list[int], extents: list[int]) -> Callable[[Tensor], Phases]:
        rotary = self.network.rotary
        if not rotary.depends_on_length:
            return rotary.phases

        def turn(position_ids: Tensor) -> Phases:
            # Each sequence by its own length: what it says does not depend on those beside it.
            parts = [rotary.phases(x, n) for x, n in zip(position_ids.split(counts, dim=1), extents)]
            cos, sin = torch.cat([part.cos for part in parts], 1), torch.cat([part.sin for part in parts], 1)
            return Phases(cos, sin, rotary.pairing)

        return turn
