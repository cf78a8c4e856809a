"""What a causal network keeps of tokens that it has read, so that it need not read them again.

Keys are kept as they are before the rotation and turned at every read, with the frequencies of the length at
hand: under a rule that depends on the length, keys rotated once would stand at angles that no query uses any more.

Sequences of different lengths are documents of one row: nothing is padded.

Shapes: T tokens of one read over all its sequences, U keys that they see, N heads, M key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from roformer_dist.batch import IGNORE_INDEX, Batch, MaskSpec
from roformer_dist.config.layers import LayerKind, layer_kind
from roformer_dist.kernels.attention import SequenceOps
from roformer_dist.kernels.linear import LinearState, Streams, document_forward, empty_state, key_state
from roformer_dist.model.linear_attention import FeatureMap, features
from roformer_dist.model.roformer import RoFormer
from roformer_dist.model.rotary import Phases
from roformer_dist.model.scores import PlainScores, Scores, Side, softmax_scores


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
    """A piece by its numbers: tokens ``start`` to ``stop`` of a sequence."""

    sequence: int
    start: int
    stop: int
    extent: int

    @property
    def count(self) -> int:
        return self.stop - self.start


class KVCache:
    """Keys and values of every softmax layer, and the state of every linear one, for several sequences.

    A full layer has room for ``capacities`` tokens, taken at its first read: ``2 M D`` numbers for each. A sliding
    layer keeps ``sliding_window - 1`` tokens, a linear layer ``M (D + 1) D`` numbers in float32, whatever the length.

    Attributes:
        lengths: tokens read of each sequence.
    """

    def __init__(self, network: RoFormer, capacities: Sequence[int]) -> None:
        """
        Args:
            network: a causal model.
            capacities: tokens that may be read of each sequence.
        """
        self._network = network
        self._capacities = list(capacities)
        self.lengths = [0] * len(self._capacities)
        model = network.config
        self._layers = [self._store(layer_kind(model, layer)) for layer in range(model.num_layers)]

    def _store(self, kind: LayerKind) -> _FullStore | _SlidingStore | _LinearStore:
        if kind == "linear":
            return _LinearStore(len(self._capacities))
        if kind == "sliding":
            assert self._network.config.sliding_window is not None, "refused with the configuration"
            return _SlidingStore(len(self._capacities), self._network.config.sliding_window - 1)
        return _FullStore(kind, self._capacities)

    def forget(self, sequence: int) -> None:
        """Start a sequence anew."""
        self.lengths[sequence] = 0
        for store in self._layers:
            store.forget(sequence)

    @torch.no_grad()
    def read(self, ops: SequenceOps, pieces: Sequence[Piece]) -> Tensor:
        """Features ``[T, hidden_size]`` of the pieces' tokens, one piece after the other; they are kept.

        Args:
            ops: how the network attends, on one rank.
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
            spans.append(_Span(piece.sequence, start, stop, piece.extent))
        read = _Read(self._network, spans)
        scores = [store.scores(read) for store in self._layers]
        hidden = self._network(read.batch(pieces), ops, scores)
        for span in spans:
            self.lengths[span.sequence] = span.stop
        return hidden[0]


class _Read:
    """One forward: positions and masks of its queries, and of the keys of each kind of layer."""

    def __init__(self, network: RoFormer, spans: Sequence[_Span]) -> None:
        self.network = network
        self.spans = spans
        self.device = network.embedding.weight.device
        self.queries = self._side([(span.start, span.stop) for span in spans])
        self._kinds: dict[LayerKind, Scores] = {}

    def batch(self, pieces: Sequence[Piece]) -> Batch:
        tokens = torch.cat([piece.tokens for piece in pieces])[None]
        positions = self.queries.position_ids
        return Batch(tokens, torch.full_like(tokens, IGNORE_INDEX), positions, positions, self._mask(0, None))

    @cached_property
    def cuts(self) -> list[slice]:
        """Where each span's tokens lie among those of the read."""
        ends = list(accumulate(span.count for span in self.spans))
        return [slice(end - span.count, end) for end, span in zip(ends, self.spans)]

    def scores(self, kind: LayerKind) -> Scores:
        """How layers of a softmax kind attend to what their stores give."""
        if kind not in self._kinds:
            self._kinds[kind] = self._make(kind)
        return self._kinds[kind]

    def _make(self, kind: LayerKind) -> Scores:
        model = self.network.config
        window = model.sliding_window if kind == "sliding" else None
        mask = self._mask(None if window is None else window - 1, window)
        if kind == "no_position":
            return PlainScores(mask)
        keys = self._side([(self._first_key(span, window), span.stop) for span in self.spans])
        bias = self.network.positions.score_bias(self.queries.position_ids, keys.position_ids, causal=True)
        return softmax_scores(model, mask, self.queries, keys, bias)

    @staticmethod
    def _first_key(span: _Span, window: int | None) -> int:
        return 0 if window is None else max(0, span.start - window + 1)

    def _mask(self, kept: int | None, window: int | None) -> MaskSpec:
        """Queries after the last ``kept`` keys before them (None: all) and among themselves."""
        firsts = [0 if kept is None else max(0, span.start - kept) for span in self.spans]
        q_lens = [span.count for span in self.spans]
        k_lens = [span.stop - first for span, first in zip(self.spans, firsts)]

        def integers(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        return MaskSpec(
            cu_seqlens_q=integers(list(accumulate(q_lens, initial=0))),
            cu_seqlens_k=integers(list(accumulate(k_lens, initial=0))),
            max_q=max(q_lens),
            max_k=max(k_lens),
            causal=True,
            q_offset=integers([span.start for span in self.spans]),
            k_offset=integers(firsts),
            window=window,
        )

    def _side(self, ranges: Sequence[tuple[int, int]]) -> Side:
        positions = torch.cat([torch.arange(*bounds, device=self.device) for bounds in ranges])[None]
        if self.network.config.position.kind != "rotary":
            return Side(positions, None)
        counts, extents = [stop - start for start, stop in ranges], [span.extent for span in self.spans]
        return Side(positions, self._turning(counts, extents))

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


class _FullStore:
    """Every key and value of a layer, in buffers as long as the sequences may become."""

    def __init__(self, kind: LayerKind, capacities: Sequence[int]) -> None:
        self._kind: LayerKind = kind
        self._capacities = capacities
        self._held: list[tuple[Tensor, Tensor] | None] = [None] * len(capacities)

    def forget(self, sequence: int) -> None:
        self._held[sequence] = None

    def scores(self, read: _Read) -> Scores:
        return _Cached(self, read.scores(self._kind), read)

    def extend(self, span: _Span, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[U, M, D]`` that the span's queries see, given its own ``[n, M, D]``."""
        held = self._held[span.sequence]
        if held is None:
            room = self._capacities[span.sequence]
            held = self._held[span.sequence] = (
                k.new_empty(room, *k.shape[1:]),
                v.new_empty(room, *v.shape[1:]),
            )
        for buffer, new in zip(held, (k, v)):
            buffer[span.start : span.stop] = new
        return held[0][: span.stop], held[1][: span.stop]


class _SlidingStore:
    """The last keys and values of a layer that no future query is too far from."""

    def __init__(self, sequences: int, kept: int) -> None:
        self._kept = kept
        self._held: list[tuple[Tensor, Tensor] | None] = [None] * sequences

    def forget(self, sequence: int) -> None:
        self._held[sequence] = None

    def scores(self, read: _Read) -> Scores:
        return _Cached(self, read.scores("sliding"), read)

    def extend(self, span: _Span, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See _FullStore."""
        held = self._held[span.sequence]
        if held is not None:
            k, v = torch.cat([held[0], k]), torch.cat([held[1], v])
        # Copies: a view would keep the whole chunk alive.
        first = max(0, len(k) - self._kept)
        self._held[span.sequence] = k[first:].clone(), v[first:].clone()
        return k, v


class _LinearStore:
    """The state of a linear layer."""

    def __init__(self, sequences: int) -> None:
        self.states: list[LinearState | None] = [None] * sequences

    def forget(self, sequence: int) -> None:
        self.states[sequence] = None

    def scores(self, read: _Read) -> Scores:
        return _CachedLinear(self, read, read.network.config.linear_features)


@dataclass(frozen=True)
class _Cached:
    """Scores of one softmax layer over what its store holds and the new tokens."""

    store: _FullStore | _SlidingStore
    inner: Scores
    read: _Read

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ops: SequenceOps) -> Tensor:
        """See Scores."""
        spans, cuts = self.read.spans, self.read.cuts
        pairs = [self.store.extend(span, k[0, cut], v[0, cut]) for span, cut in zip(spans, cuts)]
        keys, values = (x[0] if len(x) == 1 else torch.cat(x) for x in zip(*pairs))
        return self.inner(q, keys[None], values[None], ops)


@dataclass(frozen=True)
class _CachedLinear:
    """Linear attention of one layer, recurrent from one read to the next."""

    store: _LinearStore
    read: _Read
    kind: FeatureMap

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ops: SequenceOps) -> Tensor:
        """See Scores; states stay on one rank, so ``ops`` is not needed."""
        q, k = features(q, k, self.kind)
        phases = self.read.queries.phases
        rotated = (q, k) if phases is None else (phases.rotate(q), phases.rotate(k))
        streams = Streams(*(x[0] for x in (*rotated, q, k, v)))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for span, cut in zip(self.read.spans, self.read.cuts):
            piece = streams.cut(cut)
            before = self.store.states[span.sequence] or empty_state(piece)
            numerator, denominator = document_forward(piece, before, causal=True)
            out[0, cut] = (numerator / denominator[..., None]).to(out.dtype)
            self.store.states[span.sequence] = before + key_state(piece)
        return out
