"""Cross-entropy from features, without the logits of all tokens at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Rows of logits held at a time: 1,024 x 32k float32 logits are 128 MiB.
CHUNK_ROWS = 1024


def cross_entropy(features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target, float32 ``[tokens]``.

    The forward keeps features only; the backward computes each chunk of logits again.

    Args:
        features: ``[tokens, hidden_size]``.
        weight, bias: the output layer, ``[vocab_size, hidden_size]`` and ``[vocab_size]``.
        targets: int64 ``[tokens]``, all of them valid.
    """
    chunks = [
        checkpoint(_chunk, part, weight, bias, wanted, use_reentrant=False, preserve_rng_state=False)
        for part, wanted in zip(features.split(CHUNK_ROWS), targets.split(CHUNK_ROWS))
    ]
    return torch.cat(chunks)


def _chunk(features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    logits = F.linear(features, weight, bias)
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none"
    )
