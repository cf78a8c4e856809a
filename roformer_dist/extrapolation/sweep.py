"""The sweep: the same targets at several context lengths, under several frequency rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from roformer_dist.config.schema import (
    LinearScaling,
    NoScaling,
    NtkScaling,
    RopeScaling,
    YarnScaling,
)
from roformer_dist.extrapolation.intervals import Estimate, clustered_mean
from roformer_dist.extrapolation.perplexity import (
    Documents,
    Windows,
    choose_windows,
    evaluating,
    scaled_rotation,
    sliding_ends,
    sliding_nll,
    window_nll,
)
from roformer_dist.kernels.attention import SequenceOps
from roformer_dist.model.roformer import RoFormer

CROPPED = "cropped"
LABELS = {
    "none": "RoPE, unscaled",
    "linear": "linear (PI)",
    "ntk": "NTK-aware",
    "yarn": "YaRN",
    CROPPED: "cropped to trained length",
}
METHODS = tuple(name for name in LABELS if name != CROPPED)

Progress = Callable[[int, int, str], None]
"""Called with (tokens done, tokens in all, what was computed)."""


@dataclass(frozen=True)
class LengthPoint:
    """Loss of the scored targets under ``method`` with a context of ``length`` tokens.

    Attributes:
        factor: the scaling factor, ``max(1, length / trained_seq_len)``; 1 for unscaled and cropped.
        nll: over all scored targets.
        minus_cropped: of the paired differences to the cropped model.
    """

    method: str
    length: int
    factor: float
    nll: Estimate
    minus_cropped: Estimate


@dataclass(frozen=True)
class PositionPoint:
    """Loss of the targets that have ``first`` to ``last`` tokens before them in the longest window."""

    method: str
    first: int
    last: int
    factor: float
    nll: Estimate
    minus_cropped: Estimate


@dataclass(frozen=True)
class SweepResult:
    """What was measured and on what.

    Attributes:
        methods: in the order asked for, without the cropped baseline, which is always there.
        scored: targets of a window, ``trained_seq_len // 2``.
        documents, skipped: documents that gave windows, and those too short or not needed.
        tokens: fed through the network.
    """

    trained_seq_len: int
    lengths: tuple[int, ...]
    methods: tuple[str, ...]
    scored: int
    windows: int
    documents: int
    skipped: int
    tokens: int
    by_length: tuple[LengthPoint, ...]
    by_position: tuple[PositionPoint, ...]

    @property
    def longest(self) -> int:
        """The longest context, in tokens."""
        return self.lengths[-1]

    @property
    def targets(self) -> int:
        """Scored targets, the same at every length."""
        return self.windows * self.scored

    def at(self, method: str, length: int) -> LengthPoint:
        """The point of one method (or ``cropped``) at one length."""
        return next(p for p in self.by_length if (p.method, p.length) == (method, length))


def run_sweep(
    network: RoFormer,
    ops: SequenceOps,
    documents: Documents,
    *,
    trained_seq_len: int,
    lengths: Sequence[int],
    methods: Sequence[str],
    device: torch.device | str = "cpu",
    token_budget: int = 700_000,
    progress: Progress = lambda done, total, what: None,
) -> SweepResult:
    """Score the same targets of held-out documents at every length and method, and by position.

    Args:
        network: a causal model on ``device``; its rotation and mode are restored afterwards.
        ops: how it attends.
        lengths: contexts in tokens, at least half the trained length each.
        methods: of ``METHODS``; the factor is length / trained_seq_len.
        token_budget: about how many tokens are fed in all; it sets the number of windows.

    Raises:
        ValueError: one line, for lengths, methods, models or documents that do not fit.
    """
    lengths, methods = _checked(network, trained_seq_len, lengths, methods)
    scored = trained_seq_len // 2
    cost = _tokens_per_window(trained_seq_len, lengths, methods)
    windows = choose_windows(
        documents, longest=lengths[-1], scored=scored, count=max(1, token_budget // cost)
    )
    total, done = cost * len(windows.tokens), 0

    def advance_as(what: str) -> Callable[[int], None]:
        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress(done, total, what)

        return advance

    with evaluating(network):
        cropped = sliding_nll(
            network, ops, windows.tokens, length=trained_seq_len, scored=scored, device=device,
            advance=advance_as(LABELS[CROPPED]),
        )
        losses = _losses(
            network, ops, windows, trained_seq_len, lengths, methods, cropped, device, advance_as
        )
    used = len(np.unique(windows.document))
    return SweepResult(
        trained_seq_len, lengths, methods, scored, len(windows.tokens), used,
        len(documents.lengths) - used, total,
        _by_length(losses, cropped, windows.document, trained_seq_len, lengths, methods, scored),
        _by_position(losses, cropped, windows.document, trained_seq_len, lengths[-1], methods),
    )


def scaling_of(method: str, *, length: int, trained_seq_len: int) -> RopeScaling:
    """The frequency rule ``method`` for a context of ``length``; below the trained length none is needed."""
    factor = max(1.0, length / trained_seq_len)
    match method:
        case "linear":
            return LinearScaling(kind="linear", factor=factor)
        case "ntk":
            return NtkScaling(kind="ntk", factor=factor)
        case "yarn":
            return YarnScaling(kind="yarn", factor=factor, original_seq_len=trained_seq_len)
        case _:
            return NoScaling()


def position_edges(trained_seq_len: int, longest: int) -> list[int]:
    """Edges of the position buckets: half octaves around the trained length, from about 16 to ``longest``."""
    steps = range(math.ceil(2 * math.log2(16 / trained_seq_len)), math.ceil(2 * math.log2(longest / trained_seq_len)))
    edges = {round(trained_seq_len * 2 ** (step / 2)) for step in steps}
    return [0, *sorted(edge for edge in edges if 0 < edge < longest), longest]


def _losses(
    network: RoFormer,
    ops: SequenceOps,
    windows: Windows,
    trained: int,
    lengths: tuple[int, ...],
    methods: tuple[str, ...],
    cropped: np.ndarray,
    device: torch.device | str,
    advance_as: Callable[[str], Callable[[int], None]],
) -> dict[tuple[str, int], np.ndarray]:
    """Loss ``[W, C]`` by (method, length); at the longest length ``[W, longest]``, of every target."""
    losses: dict[tuple[str, int], np.ndarray] = {}
    for length in lengths:
        # Every target of the longest window is kept for the curve by position.
        scored = length if length == lengths[-1] else trained // 2
        if length == trained:
            # Unscaled at the trained length is what the cropped baseline does.
            shared = cropped[:, -scored:]
            losses |= {(method, length): shared for method in methods}
            continue
        for method in methods if length > trained else methods[:1]:
            scaling = scaling_of(method, length=length, trained_seq_len=trained)
            with scaled_rotation(network, scaling):
                losses[method, length] = window_nll(
                    network, ops, windows.tokens, length=length, scored=scored, device=device,
                    advance=advance_as(f"{LABELS[method]}, {length:,} tokens"),
                )
        losses |= {(method, length): losses.get((method, length), losses[methods[0], length]) for method in methods}
    return losses
