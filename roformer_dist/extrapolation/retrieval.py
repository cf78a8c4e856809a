"""Retrieval: is a passage of another text, seen once far back, repeated when its beginning comes again?

A prompt is held-out text with a passage of another held-out document at some depth, and ends with the passage's first
``CUE`` tokens. The network is asked for the ``ANSWER`` tokens that follow them in the passage, twice: what it
generates greedily, and the loss of the true ones. The same prompt with more text in the place of the passage says what
the cue alone tells. It is the passkey test (arXiv 2305.16300) without instructions and digits, so that it works for a
network that was only pretrained, in any language, with any tokenizer.

Shapes: W trials, L context length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from roformer_dist.extrapolation.intervals import Estimate, clustered_mean
from roformer_dist.extrapolation.perplexity import (
    FORWARD_TOKENS,
    Documents,
    Score,
    Windows,
    causal_rows,
    choose_windows,
    evaluating,
    scaled_rotation,
)
from roformer_dist.extrapolation.result import LABELS
from roformer_dist.extrapolation.sweep import Grid, Progress
from roformer_dist.model.roformer import RoFormer

CUE, ANSWER = 8, 8
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHORTEST = 2 * (2 * CUE + ANSWER)  # half of it is text
DEFAULT_TRIALS = 2
_TRIES = 1000


class Continue(Protocol):
    """Greedy continuation, on one rank or on many; ``engine.scoring.Continuer`` is one."""

    def __call__(self, network: RoFormer, prompts: Sequence[Tensor], new_tokens: int) -> list[list[int]]:
        """The next ``new_tokens`` tokens of each prompt int64 ``[n]``; the same on all ranks."""
        ...


@dataclass(frozen=True)
class RetrievalPoint:
    """What ``method`` finds at ``depth`` of a context of ``length`` tokens.

    Attributes:
        depth: where the passage begins, 0 (first token) to 1 (just before the cue); None: nowhere.
        distance: tokens from the passage's first one to the answer; 0 without a passage.
        recalled: answers that were generated exactly, of ``trials``.
        gain: by how many nats per token the passage lowers the loss of the answer.
    """

    method: str
    length: int
    depth: float | None
    distance: int
    recalled: int
    trials: int
    gain: Estimate


@dataclass(frozen=True)
class RetrievalResult:
    """All points, of each method, length and depth, and each time one without a passage."""

    trained_seq_len: int
    lengths: tuple[int, ...]
    methods: tuple[str, ...]
    trials: int
    points: tuple[RetrievalPoint, ...]

    def at(self, method: str, length: int, depth: float | None) -> RetrievalPoint:
        """The point of one method at one length and depth."""
        return next(p for p in self.points if (p.method, p.length, p.depth) == (method, length, depth))

    def recalled(self, method: str, length: int) -> tuple[int, int]:
        """Answers generated exactly over all depths, and trials."""
        points = [self.at(method, length, depth) for depth in DEPTHS]
        return sum(p.recalled for p in points), sum(p.trials for p in points)


@dataclass(frozen=True)
class Trials:
    """What is asked: in each of ``windows`` one of ``passages``, int64 ``[CUE + ANSWER]`` of another document."""

    windows: Windows
    passages: list[Tensor]


def run_retrieval(
    network: RoFormer,
    score: Score,
    continue_: Continue,
    trials: Trials,
    grid: Grid,
    *,
    progress: Progress = lambda done, total, what: None,
) -> RetrievalResult:
    """Ask for the passages at every length, method and depth of a checked ``grid``.

    The texts and passages of a trial are the same everywhere; shorter contexts are the ends of longer ones.

    Raises:
        ValueError: one line, for logits that are not finite.
    """
    windows, passages = trials.windows, trials.passages
    texts, places = [*zip(windows.tokens, passages)], (None, *DEPTHS)
    found: dict[tuple[str, int], list[RetrievalPoint]] = {}
    total, done = retrieval_tokens(grid, len(passages)), 0

    def advance(what: str, tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done, total, what)

    with evaluating(network):
        for length, method in grid.cells:
            with scaled_rotation(network, grid.scaling(method, length)):
                prompts = [_prompt(*each, length, depth) for depth in places for each in texts]
                step = partial(advance, f"passages, {LABELS[method]}, {length:,} tokens")
                recalled, nll = _ask(network, score, continue_, prompts, passages * len(places), step)
            nll, recalled = nll.reshape(len(places), -1), recalled.reshape(len(places), -1)
            gains = nll[0] - nll
            found[method, length] = [
                RetrievalPoint(
                    method,
                    length,
                    depth,
                    0 if depth is None else length + 1 - ANSWER - _place(length, depth),
                    int(recalled[number].sum()),
                    len(passages),
                    clustered_mean(gains[number], windows.document.repeat(ANSWER)),
                )
                for number, depth in enumerate(places)
            ]
    points = [
        replace(point, method=method)
        for method in grid.methods
        for length in grid.lengths
        for point in found[grid.source(method, length), length]
    ]
    return RetrievalResult(grid.trained, grid.lengths, grid.methods, len(passages), tuple(points))


def retrieval_tokens(grid: Grid, trials: int) -> int:
    """Tokens that are fed for ``trials``: each prompt once to continue it and once for its losses."""
    return 2 * sum(length for length, _ in grid.cells) * (1 + len(DEPTHS)) * trials


def trials_within(
    open_documents: Callable[[], Documents], grid: Grid, *, token_budget: int, asked: int | None
) -> tuple[Trials | None, str]:
    """What to ask, and if it is nothing, why.

    Args:
        asked: trials as the user says, 0 for none; None: ``DEFAULT_TRIALS``, or none where they do not fit or
            would feed more than four token budgets.

    Raises:
        ValueError: what the user asked for does not fit.
    """
    if asked is not None:
        return (choose_trials(open_documents(), grid, asked) if asked else None), ""
    tokens = retrieval_tokens(grid, DEFAULT_TRIALS)
    if tokens > 4 * token_budget:
        return None, (
            f"{tokens:,} tokens are over four times --token-budget {token_budget:,}; --retrieval-trials "
            f"{DEFAULT_TRIALS} measures it"
        )
    try:
        return choose_trials(open_documents(), grid, DEFAULT_TRIALS), ""
    except ValueError as error:
        return None, str(error)


def choose_trials(documents: Documents, grid: Grid, trials: int) -> Trials:
    """The texts and passages of ``trials``, or of as many as the documents have texts for.

    Raises:
        ValueError: one line, for lengths or documents that do not fit.
    """
    if trials < 1:
        raise ValueError(f"--retrieval-trials {trials}: give at least 1, or 0 to leave retrieval out")
    if grid.lengths[0] < SHORTEST:
        raise ValueError(
            f"length {grid.lengths[0]} is too short to hide a passage in: retrieval needs {SHORTEST} tokens; drop it "
            "or give --retrieval-trials 0"
        )
    windows = choose_windows(documents, longest=grid.longest, scored=grid.scored, count=trials)
    return Trials(windows, _passages(documents, windows))


def retrieval_findings(result: RetrievalResult) -> list[str]:
    """One sentence a method about the longest length: passages that lie farther back than the trained length."""
    longest, sentences = result.lengths[-1], []
    for method in result.methods:
        far = [
            point
            for depth in DEPTHS
            if (point := result.at(method, longest, depth)).distance > result.trained_seq_len
        ]
        if not far:
            continue
        recalled, trials = sum(p.recalled for p in far), sum(p.trials for p in far)
        gain = round(sum(p.gain.mean for p in far) / len(far), 2) + 0.0  # no minus zero
        sentences.append(
            f"At {longest:,} tokens {LABELS[method]} repeats {recalled} of {trials} passages from farther back than "
            f"the trained length; to the loss of the answer they are worth {gain:.2f} nats a token (cropped: 0)."
        )
    return sentences


def _passages(documents: Documents, windows: Windows) -> list[Tensor]:
    """A passage for each window, int64 ``[CUE + ANSWER]``, of another document; its cue is not in the window."""
    generator = np.random.default_rng(1)
    lengths = np.asarray(documents.lengths)
    size = CUE + ANSWER
    passages = []
    for tokens, source in zip(windows.tokens.numpy(), windows.document.tolist()):
        # The last token of a document says that it ends.
        others = np.flatnonzero((lengths > size) & (np.arange(len(lengths)) != source))
        seen = np.lib.stride_tricks.sliding_window_view(tokens, CUE)
        for _ in range(_TRIES if len(others) else 0):
            document = int(generator.choice(others))
            start = int(generator.integers(lengths[document] - size))
            passage = documents.read(document)[start : start + size]
            repetitive = min(len(set(part.tolist())) for part in (passage[:CUE], passage[CUE:])) <= CUE // 2
            if not repetitive and not (seen == passage[:CUE]).all(axis=1).any():
                passages.append(torch.from_numpy(passage.astype(np.int64)))
                break
        else:
            raise ValueError(
                f"no held-out document besides number {source} has a passage of {size} tokens that is not in it as "
                "well; hold out more documents or give --retrieval-trials 0"
            )
    return passages


def _place(length: int, depth: float) -> int:
    """Tokens of text before the passage."""
    return round(depth * (length + 1 - ANSWER - 2 * CUE - ANSWER))


def _prompt(text: Tensor, passage: Tensor, length: int, depth: float | None) -> Tensor:
    """The prompt int64 ``[length + 1 - ANSWER]``: with all but the last token of the answer, ``length`` tokens."""
    room = length + 1 - ANSWER - CUE
    if depth is None:
        return torch.cat([text[-room:], passage[:CUE]])
    text = text[-(room - len(passage)) :]
    place = _place(length, depth)
    return torch.cat([text[:place], passage, text[place:], passage[:CUE]])


def _ask(
    network: RoFormer,
    score: Score,
    continue_: Continue,
    prompts: Sequence[Tensor],
    passages: Sequence[Tensor],
    advance: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each answer is generated exactly, bool ``[prompts]``, and the loss of each token of the true ones.

    The losses are float64 ``[prompts, ANSWER]``; ``advance`` is told the tokens of each forward.
    """
    together = max(1, FORWARD_TOKENS // len(prompts[0]))
    recalled, losses = [], []
    for first in range(0, len(prompts), together):
        some = slice(first, first + together)
        answers = [passage[CUE:].tolist() for passage in passages[some]]
        given = continue_(network, prompts[some], ANSWER)
        recalled += [a == b for a, b in zip(given, answers, strict=True)]
        whole = torch.stack([torch.cat([p, q[CUE:]]) for p, q in zip(prompts[some], passages[some])])
        nll = score(network, causal_rows(whole[:, :-1], whole[:, 1:], scored=ANSWER))
        losses.append(nll.numpy().reshape(-1, ANSWER))
        advance(2 * (len(prompts[0]) + ANSWER - 1) * len(prompts[some]))
    return np.array(recalled), np.concatenate(losses)
