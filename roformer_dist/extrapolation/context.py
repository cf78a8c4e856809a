"""What context is worth: the loss of the same targets with all of it and with the last few tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from roformer_dist.batch import IGNORE_INDEX, Batch
from roformer_dist.extrapolation.intervals import Estimate, clustered_mean
from roformer_dist.extrapolation.perplexity import FORWARD_TOKENS, Score, causal_rows, evaluating
from roformer_dist.model.roformer import RoFormer


@dataclass(frozen=True)
class ContextGain:
    """Losses of the same targets, in nats.

    Attributes:
        validation_loss: with all the context that a target's document piece gives it.
        short_context_loss: with the last ``short_context`` tokens of it.
        gain: of the paired differences short - full, clustered by document.
        previous, targets: int64 ``[n]``, the token before each target, and the target; what a bigram
            or unigram baseline needs to be compared on the same targets.
    """

    short_context: int
    validation_loss: float
    short_context_loss: float
    gain: Estimate
    previous: np.ndarray
    targets: np.ndarray


def context_gain(
    network: RoFormer,
    score: Score,
    batches: Iterable[Batch],
    *,
    documents: Sequence[int] | None = None,
    short_context: int = 8,
) -> ContextGain:
    """Compare full with short context on every valid target of causal ``batches``.

    A target whose piece has no more than ``short_context`` tokens before it has all of them in both.

    Args:
        documents: which document each piece of the batches' masks (padding too) comes from, in order:
            the clusters of the interval. None: every piece is a document of its own.

    Raises:
        ValueError: ``short_context`` is below 1, a batch is not causal, or nothing counts in any.
    """
    if short_context < 1:
        raise ValueError(f"short_context = {short_context} must be at least 1 token")
    parts: list[tuple[np.ndarray, ...]] = []
    pieces = 0
    with evaluating(network):
        for batch in batches:
            if not batch.mask.causal:
                raise ValueError("the gain of context is defined for causal batches; these see both sides")
            full = score(network, batch)
            where = (batch.labels != IGNORE_INDEX).flatten().nonzero()[:, 0]
            inputs, labels = batch.input_ids.flatten(), batch.labels.flatten()[where]
            short = full.clone()
            cut = batch.position_ids.flatten()[where] >= short_context
            if cut.any():
                short[cut] = _short_nll(network, score, inputs, where[cut], labels[cut], short_context)
            piece = pieces + torch.searchsorted(batch.mask.cu_seqlens_q[1:].long(), where, right=True)
            pieces += len(batch.mask.cu_seqlens_q) - 1
            parts.append(tuple(x.numpy() for x in (full, short, piece, inputs[where], labels)))
    if not sum(len(part[0]) for part in parts):
        raise ValueError("no target counts in the validation rows; validate on more rows")
    full, short, piece, previous, targets = (np.concatenate(column) for column in zip(*parts))
    return ContextGain(
        short_context,
        float(full.mean()),
        float(short.mean()),
        clustered_mean(short - full, piece if documents is None else np.asarray(documents)[piece]),
        previous,
        targets,
    )


def _short_nll(
    network: RoFormer,
    score: Score,
    inputs: Tensor,
    where: Tensor,
    labels: Tensor,
    length: int,
) -> Tensor:
    """Loss float64 ``[n]`` of ``labels``, one row of ``length`` inputs up to ``where`` for each."""
    rows = max(1, FORWARD_TOKENS // length)
    losses = [torch.empty(0, dtype=torch.float64)]
    for ends, wanted in zip(where.split(rows), labels.split(rows)):
        windows = inputs[ends[:, None] + torch.arange(1 - length, 1)]
        targets = wanted[:, None].expand(-1, length)
        losses.append(score(network, causal_rows(windows, targets, scored=1)))
    return torch.cat(losses)
