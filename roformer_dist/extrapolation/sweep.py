"""The sweep: the same targets at several context lengths, under several frequency rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from roformer_dist.config.layers import LearnedPosition
from roformer_dist.config.rope import LinearScaling, NoScaling, NtkScaling, RopeScaling, YarnScaling
from roformer_dist.extrapolation.intervals import clustered_mean
from roformer_dist.extrapolation.perplexity import (
    Documents,
    Score,
    choose_windows,
    evaluating,
    scaled_rotation,
    sliding_ends,
    sliding_nll,
    window_nll,
)
from roformer_dist.extrapolation.result import (
    CROPPED,
    LABELS,
    METHODS,
    LengthPoint,
    PositionPoint,
    SweepResult,
)
from roformer_dist.model.heads import LanguageHead
from roformer_dist.model.roformer import RoFormer

Progress = Callable[[int, int, str], None]
"""Called with (tokens done, tokens in all, what was computed)."""

_Nll = Callable[..., np.ndarray]


def run_sweep(
    network: RoFormer,
    score: Score,
    documents: Documents,
    *,
    trained_seq_len: int,
    lengths: Sequence[int],
    methods: Sequence[str],
    token_budget: int = 400_000,
    progress: Progress = lambda done, total, what: None,
) -> SweepResult:
    """Score the same targets of held-out documents at every length and method, and by position.

    Args:
        network: a causal model; its rotation and mode are restored afterwards.
        score: how its losses are computed; where ranks share rows, all of them call this with the same arguments.
        lengths: contexts in tokens, at least half the trained length each.
        methods: of ``METHODS``; their factor is length / trained_seq_len, at least 1.
        token_budget: about how many tokens are fed in all; it sets the number of windows.

    Raises:
        ValueError: one line, for lengths, methods, models or documents that do not fit.
    """
    grid = check_sweep(network, trained_seq_len=trained_seq_len, lengths=lengths, methods=methods)
    cost = grid.tokens_per_window
    windows = choose_windows(
        documents, longest=grid.longest, scored=grid.scored, count=max(1, token_budget // cost)
    )
    total, done = cost * len(windows.tokens), 0

    def advance(what: str, tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done, total, what)

    def feed(nll: _Nll, what: str, *, length: int, scored: int) -> np.ndarray:
        step = partial(advance, what)
        return nll(network, score, windows.tokens, length=length, scored=scored, advance=step)

    with evaluating(network):
        cropped = feed(sliding_nll, LABELS[CROPPED], length=grid.trained, scored=grid.scored)
        losses = {(CROPPED, length): cropped for length in grid.lengths}
        for length, method in grid.cells:
            if length == grid.trained:
                losses[method, length] = cropped
                continue
            with scaled_rotation(network, grid.scaling(method, length)):
                # Every target of the longest window counts, for the curve by position.
                scored = length if length == grid.longest else grid.scored
                what = f"{LABELS[method]}, {length:,} tokens"
                losses[method, length] = feed(window_nll, what, length=length, scored=scored)
    return SweepResult(
        trained_seq_len=grid.trained,
        lengths=grid.lengths,
        methods=grid.methods,
        scored=grid.scored,
        windows=len(windows.tokens),
        documents=len(np.unique(windows.document)),
        too_short=int((np.asarray(documents.lengths) <= grid.longest).sum()),
        tokens=total,
        by_length=_by_length(grid, losses, windows.document),
        by_position=_by_position(grid, losses, windows.document),
    )


def check_sweep(
    network: RoFormer, *, trained_seq_len: int, lengths: Sequence[int], methods: Sequence[str]
) -> Grid:
    """The grid of a sweep, before anything is computed; ValueError as ``run_sweep`` raises it."""
    grid = Grid(trained_seq_len, tuple(sorted(set(lengths))), tuple(dict.fromkeys(methods)))
    grid.check()
    _check_model(network, grid)
    return grid


@dataclass(frozen=True)
class Grid:
    """Which lengths and methods are evaluated, and which of them are the same evaluation."""

    trained: int
    lengths: tuple[int, ...]
    methods: tuple[str, ...]

    @property
    def longest(self) -> int:
        """The longest context."""
        return self.lengths[-1]

    @property
    def scored(self) -> int:
        """Targets of a window."""
        return self.trained // 2

    def source(self, method: str, length: int) -> str:
        """The method whose evaluation serves ``method`` at ``length``: with factor 1 all are the first."""
        return method if length > self.trained or method == CROPPED else self.methods[0]

    @property
    def cells(self) -> list[tuple[int, str]]:
        """Each (length, method) that is an evaluation of its own."""
        return [(n, m) for n in self.lengths for m in self.methods if self.source(m, n) == m]

    @property
    def tokens_per_window(self) -> int:
        """Tokens fed for one window over the whole sweep."""
        own = sum(length for length, _ in self.cells if length != self.trained)
        return own + self.trained * len(sliding_ends(self.longest, self.trained, self.scored))

    def factor(self, method: str, length: int) -> float:
        """The scaling factor; 1 for what does not scale and within the trained length."""
        return 1.0 if method in ("none", CROPPED) else max(1.0, length / self.trained)

    def scaling(self, method: str, length: int) -> RopeScaling:
        """The frequency rule of ``method`` for a context of ``length``."""
        factor = self.factor(method, length)
        match method:
            case "linear":
                return LinearScaling(kind="linear", factor=factor)
            case "ntk":
                return NtkScaling(kind="ntk", factor=factor)
            case "yarn":
                return YarnScaling(kind="yarn", factor=factor, original_seq_len=self.trained)
            case _:
                return NoScaling()

    def check(self) -> None:
        """Raise ``ValueError`` with one line where the grid makes no sense."""
        if self.trained < 2:
            raise ValueError(
                f"trained_seq_len = {self.trained}: half of it is scored, so it must be at least 2"
            )
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown:
            raise ValueError(f"unknown method {unknown[0]!r}; known: {', '.join(METHODS)}")
        if not self.methods or not self.lengths:
            raise ValueError(f"give at least one length and one method ({', '.join(METHODS)})")
        if self.lengths[0] < self.scored:
            raise ValueError(
                f"length {self.lengths[0]} is below {self.scored}, half the trained length, which is what is "
                f"scored; give lengths from {self.scored} up"
            )
        if self.longest < self.trained:
            raise ValueError(
                f"the longest length, {self.longest}, is below the trained length, {self.trained}; include "
                f"{self.trained} or more, such as {2 * self.trained}"
            )


def position_edges(trained: int, longest: int) -> list[int]:
    """Edges of the position buckets, from 0 to ``longest``; the trained length is one of them.

    Octaves below the trained length, down to 16 or so, where buckets hold few targets; half octaves
    beyond it, which is what the figure is about. Neighbouring edges ``a, b`` hold the targets with
    ``a + 1`` to ``b`` tokens before them.
    """
    octaves = range(1, max(1, math.floor(math.log2(trained / 16)) + 1))
    half_octaves = range(math.ceil(2 * math.log2(longest / trained)))
    edges = {round(trained / 2**step) for step in octaves}
    edges |= {round(trained * 2 ** (step / 2)) for step in half_octaves}
    return sorted({0, *edges, longest})


def _by_length(
    grid: Grid, losses: Mapping[tuple[str, int], np.ndarray], document: np.ndarray
) -> tuple[LengthPoint, ...]:
    clusters = document.repeat(grid.scored)
    cropped = losses[CROPPED, grid.longest][:, -grid.scored :].ravel()
    points = []
    for method in (CROPPED, *grid.methods):
        for length in grid.lengths:
            nll = losses[grid.source(method, length), length][:, -grid.scored :].ravel()
            estimates = clustered_mean(nll, clusters), clustered_mean(nll - cropped, clusters)
            points.append(LengthPoint(method, length, grid.factor(method, length), *estimates))
    return tuple(points)


def _by_position(
    grid: Grid, losses: Mapping[tuple[str, int], np.ndarray], document: np.ndarray
) -> tuple[PositionPoint, ...]:
    longest = grid.longest
    edges = position_edges(grid.trained, longest)
    points = []
    for method in (CROPPED, *grid.methods):
        curve = losses[grid.source(method, longest), longest]
        for start, stop in pairwise(edges):
            nll, cropped = (x[:, start:stop].ravel() for x in (curve, losses[CROPPED, longest]))
            clusters = document.repeat(stop - start)
            estimates = clustered_mean(nll, clusters), clustered_mean(nll - cropped, clusters)
            points.append(PositionPoint(method, start + 1, stop, grid.factor(method, longest), *estimates))
    return tuple(points)


def _check_model(network: RoFormer, grid: Grid) -> None:
    if not isinstance(network.head, LanguageHead):
        raise ValueError("a classification model has no next-token loss to sweep; give a causal checkpoint")
    if network.head.masked:
        raise ValueError("a masked language model has no next-token loss to sweep; give a causal checkpoint")
    kind = network.config.rope.scaling.kind
    if kind != "none":
        raise ValueError(
            f"model.rope.scaling is {kind!r} already, and scaling rules do not add up; sweep a checkpoint "
            "trained without one"
        )
    position = network.config.position
    scaled = [method for method in grid.methods if method not in ("none", CROPPED)]
    if position.kind != "rotary" and scaled:
        raise ValueError(
            f"method {scaled[0]!r} changes rotary frequencies, and model.position.kind is {position.kind!r}; "
            "the method none works"
        )
    if isinstance(position, LearnedPosition) and grid.longest > position.max_seq_len:
        raise ValueError(
            f"length {grid.longest} is beyond the {position.max_seq_len} positions that have learned vectors "
            "(model.position.max_seq_len); a learned position has no value there"
        )
