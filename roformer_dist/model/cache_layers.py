"""What the layers of a cache keep of the tokens that they have read, and how they attend to it.

Shapes: T tokens of one read over all its sequences, U keys that they see, N heads, M key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from roformer_dist.config.layers import LayerKind
from roformer_dist.kernels.attention import SequenceOps
from roformer_dist.kernels.linear import LinearState, Streams, document_forward, empty_state, key_state
from roformer_dist.model.linear_attention import FeatureMap, features
from roformer_dist.model.scores import Scores, Side
from roformer_dist.model.sharing import ReadShare


class Read(Protocol):
    """One forward, as a layer's store sees it; sequences by their place in the read."""

    @property
    def sequences(self) -> Sequence[int]:
        """Their numbers in the cache."""
        ...

    @property
    def cuts(self) -> Sequence[slice]:
        """Where each sequence's tokens lie among this rank's."""
        ...

    @property
    def new(self) -> Sequence[slice]:
        """Those of them whose keys and values are kept."""
        ...

    @property
    def queries(self) -> Side:
        """This rank's tokens."""
        ...

    @property
    def share(self) -> ReadShare | None:
        """None: this is the only rank."""
        ...

    def held(self, place: int) -> int:
        """Keys kept of a sequence before this read."""
        ...

    def within(self, place: int, window: int) -> int:
        """Keys kept of a sequence after this read that its next query sees in ``window`` positions."""
        ...

    def scores(self, kind: LayerKind) -> Scores:
        """How layers of a softmax kind attend to what their stores give."""
        ...

    def ops(self, kind: LayerKind, ops: SequenceOps) -> SequenceOps:
        """``ops``, or what reaches the keys of such layers on other ranks too."""
        ...


class Store(Protocol):
    """What one layer keeps."""

    def forget(self, sequence: int) -> None:
        """Keep nothing of a sequence."""
        ...

    def scores(self, read: Read) -> Scores:
        """How the layer attends in this read, keeping what it needs later."""
        ...


class FullStore:
    """Every key and value of a layer, in buffers as long as the sequences may become."""

    def __init__(self, kind: LayerKind, rooms: Sequence[int]) -> None:
        self.kind: LayerKind = kind
        self._rooms = rooms
        self._held: list[tuple[Tensor, Tensor] | None] = [None] * len(rooms)

    def forget(self, sequence: int) -> None:
        """See Store."""
        self._held[sequence] = None

    def scores(self, read: Read) -> Scores:
        """See Store."""
        return _Cached(self, read.scores(self.kind), read)

    def extend(self, read: Read, place: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[U, M, D]`` that a sequence's queries see here, given the new ones ``[n, M, D]``."""
        sequence = read.sequences[place]
        held = self._held[sequence]
        if held is None:
            room = self._rooms[sequence]
            held = self._held[sequence] = (k.new_empty(room, *k.shape[1:]), v.new_empty(room, *v.shape[1:]))
        start = read.held(place)
        stop = start + len(k)
        for buffer, new in zip(held, (k, v)):
            buffer[start:stop] = new
        return held[0][:stop], held[1][:stop]


class SlidingStore:
    """The last keys and values of a layer that no future query is too far from."""

    kind: LayerKind = "sliding"

    def __init__(self, sequences: int, window: int) -> None:
        self._window = window
        self._held: list[tuple[Tensor, Tensor] | None] = [None] * sequences

    def forget(self, sequence: int) -> None:
        """See Store."""
        self._held[sequence] = None

    def scores(self, read: Read) -> Scores:
        """See Store."""
        return _Cached(self, read.scores("sliding"), read)

    def extend(self, read: Read, place: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See FullStore."""
        sequence = read.sequences[place]
        held = self._held[sequence]
        if held is not None:
            k, v = torch.cat([held[0], k]), torch.cat([held[1], v])
        # Copies: a view would keep the whole chunk alive.
        first = len(k) - read.within(place, self._window)
        self._held[sequence] = k[first:].clone(), v[first:].clone()
        return k, v


class LinearStore:
    """The state of a linear layer, the same on every rank."""

    def __init__(self, sequences: int, kind: FeatureMap) -> None:
        self.kind: FeatureMap = kind
        self.states: list[LinearState | None] = [None] * sequences

    def forget(self, sequence: int) -> None:
        """See Store."""
        self.states[sequence] = None

    def scores(self, read: Read) -> Scores:
        """See Store."""
        return _CachedLinear(self, read)


@dataclass(frozen=True)
class _Cached:
    """Scores of one softmax layer over what its store holds and the new tokens."""

    store: FullStore | SlidingStore
    inner: Scores
    read: Read

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ops: SequenceOps) -> Tensor:
        """See Scores."""
        pairs = [self.store.extend(self.read, i, k[0, new], v[0, new]) for i, new in enumerate(self.read.new)]
        keys, values = (x[0] if len(x) == 1 else torch.cat(x) for x in zip(*pairs))
        return self.inner(q, keys[None], values[None], self.read.ops(self.store.kind, ops))


@dataclass(frozen=True)
class _CachedLinear:
    """Linear attention of one layer, recurrent from one read to the next."""

    store: LinearStore
    read: Read

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ops: SequenceOps) -> Tensor:
        """See Scores; what ranks add up are states, so ``ops`` is not needed."""
        q, k = features(q, k, self.store.kind)
        phases = self.read.queries.phases
        rotated = (q, k) if phases is None else (phases.rotate(q), phases.rotate(k))
        streams = Streams(*(x[0] for x in (*rotated, q, k, v)))
        pieces = [streams.cut(cut) for cut in self.read.cuts]
        states = [key_state(piece) for piece in pieces]
        earlier: list[LinearState] | None = None
        if self.read.share is not None:
            both = zip(*(self.read.share.sums(torch.stack(x)) for x in zip(*((s.kv, s.k) for s in states))))
            earlier, states = ([LinearState(*x) for x in zip(*sums)] for sums in both)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for i, (sequence, cut) in enumerate(zip(self.read.sequences, self.read.cuts)):
            held = self.store.states[sequence] or empty_state(pieces[i])
            before = held if earlier is None else held + earlier[i]
            numerator, denominator = document_forward(pieces[i], before, causal=True)
            out[0, cut] = (numerator / denominator[..., None]).to(out.dtype)
            self.store.states[sequence] = held + states[i]
        return out
