"""Losses of chosen targets with a chosen amount of context: windows, forwards, rotation swaps.

Shapes: W windows, L context length, C scored targets of a window, V tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from roformer_dist.batch import IGNORE_INDEX, Batch, MaskSpec
from roformer_dist.config.rope import RopeScaling
from roformer_dist.model.roformer import RoFormer
from roformer_dist.model.rotary import Rotary

# Tokens of one forward: enough rows to keep the cores busy, few enough to stay in tens of MiB.
FORWARD_TOKENS = 16_384


class Score(Protocol):
    """Losses of a batch, on one rank or on many; ``engine.scoring.Scorer`` is one."""

    def __call__(self, network: RoFormer, batch: Batch) -> Tensor:
        """Negative log-likelihood float64 ``[targets]`` of every valid target, row by row, on the CPU.

        Ranks that share rows are all given the whole batch, and all get every loss.
        """
        ...


class Documents(Protocol):
    """Held-out documents by number; ``data.store.ShardStore`` is one."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 ``[documents]``, tokens of each document."""
        ...

    def read(self, document: int) -> np.ndarray:
        """The tokens of one document, int64 ``[tokens]``."""
        ...


@dataclass(frozen=True)
class Windows:
    """Pieces of documents, all of one length.

    Attributes:
        tokens: int64 ``[W, V]``; the longest context and the target after it.
        document: int64 ``[W]``, where each window comes from.
    """

    tokens: Tensor
    document: np.ndarray


def choose_windows(documents: Documents, *, longest: int, scored: int, count: int) -> Windows:
    """About ``count`` windows of ``longest + 1`` tokens, spread over documents and inside them.

    Documents take turns (in a fixed shuffled order) until there are ``count`` windows or no document
    has room; inside a document the windows end at the middles of equal parts of its possible ends,
    at least ``scored`` apart, so that no target is scored twice.

    Raises:
        ValueError: no document has ``longest + 1`` tokens; names the longest one.
    """
    lengths = np.asarray(documents.lengths)
    # A window that ends at e has the inputs e - longest .. e - 1 and the last target e.
    room = np.where(lengths > longest, np.maximum(1, (lengths - 1 - longest) // scored), 0)
    if not room.any():
        if not len(lengths):
            raise ValueError("there are no held-out documents; give a store with some")
        best = int(lengths.argmax())
        raise ValueError(
            f"no held-out document has the {longest + 1} tokens that a context of {longest} needs: the longest "
            f"is document {best} with {lengths[best]}; drop the lengths above {max(lengths[best] - 1, 0)} or "
            "hold out longer documents"
        )
    taken = np.zeros_like(room)
    order = np.random.default_rng(0).permutation(np.flatnonzero(room))
    while taken.sum() < count and (taken < room).any():
        for document in order[(taken < room)[order]][: count - taken.sum()]:
            taken[document] += 1
    tokens, sources = [], []
    for document in np.flatnonzero(taken):
        ids = documents.read(int(document))
        parts = (np.arange(taken[document]) + 0.5) / taken[document]
        ends = longest + (parts * (len(ids) - 1 - longest)).astype(int)
        tokens += [ids[end - longest : end + 1] for end in ends]
        sources += [document] * len(ends)
    return Windows(torch.from_numpy(np.stack(tokens).astype(np.int64)), np.array(sources))


def window_nll(
    network: RoFormer,
    score: Score,
    tokens: Tensor,
    *,
    length: int,
    scored: int,
    advance: Callable[[int], None],
) -> np.ndarray:
    """Loss of the last ``scored`` targets of each window, when its last ``length`` inputs are fed.

    Positions count from the first input fed. Target ``i`` of a window sees between
    ``length - scored + 1`` and ``length`` tokens.

    Args:
        tokens: int64 ``[W, V]``, V > length.
        advance: called with the number of tokens of each finished forward.

    Returns:
        float64 ``[W, scored]``, in nats.

    Raises:
        ValueError: a loss is not finite.
    """
    rows = max(1, FORWARD_TOKENS // length)
    parts = []
    for part in tokens[:, -(length + 1) :].split(rows):
        nll = score(network, causal_rows(part[:, :-1], part[:, 1:], scored=scored))
        parts.append(nll.numpy().reshape(len(part), scored))
        advance(len(part) * length)
    result = np.concatenate(parts)
    if not np.isfinite(result).all():
        raise ValueError(
            f"the loss is not finite at a context of {length}: the checkpoint is damaged or diverged"
        )
    return result


def sliding_nll(
    network: RoFormer,
    score: Score,
    tokens: Tensor,
    *,
    length: int,
    scored: int,
    advance: Callable[[int], None],
) -> np.ndarray:
    """Loss of every target of each window, cropped: windows of ``length`` slide in strides of ``scored``.

    The first ``length`` targets come from the first sliding window, all others see between
    ``length - scored + 1`` and ``length`` tokens. The strides are laid from the end, so that the last
    ``scored`` targets are those of ``window_nll`` at ``length``.

    Returns:
        float64 ``[W, V - 1]``, in nats.
    """
    longest = tokens.shape[1] - 1
    result = np.empty((len(tokens), longest))
    for end in sliding_ends(longest, length, scored):
        new = length if end == length else min(scored, end - length)
        result[:, end - new : end] = window_nll(
            network, score, tokens[:, : end + 1], length=length, scored=new, advance=advance
        )
    return result


def sliding_ends(longest: int, length: int, stride: int) -> list[int]:
    """Where the windows of ``sliding_nll`` end: every ``stride`` from ``longest`` down, and at ``length``."""
    return [length, *range(longest, length, -stride)]


def causal_rows(inputs: Tensor, targets: Tensor, *, scored: int) -> Batch:
    """A batch of unrelated rows of one length, of which only the last ``scored`` targets count.

    Args:
        inputs, targets: int64 ``[rows, length]``.
    """
    rows, length = inputs.shape
    labels = targets.clone()
    labels[:, : length - scored] = IGNORE_INDEX
    positions = torch.arange(length).expand(rows, length)
    # Counters feed dropout only, which does not act in evaluation.
    return Batch(inputs, labels, positions, positions, MaskSpec.from_lengths([length] * rows, causal=True))


@contextmanager
def evaluating(network: RoFormer) -> Iterator[None]:
    """Evaluation mode and no autograd; the network's mode is restored."""
    training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        network.train(training)


@contextmanager
def scaled_rotation(network: RoFormer, scaling: RopeScaling) -> Iterator[None]:
    """The same weights with other rotary frequencies; the network's own are restored."""
    original = network.rotary
    rope = network.config.rope.model_copy(update={"scaling": scaling})
    network.rotary = Rotary(rope, network.config.head_size)
    try:
        yield
    finally:
        network.rotary = original
