"""What simple statistics predict: the bars a trained model is compared with. All in nats.

Kneser-Ney follows Chen and Goodman (1998): one absolute discount n1 / (n1 + 2 n2) for each order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


def unigram_entropy(targets: np.ndarray) -> float:
    """Entropy of the empirical distribution of ``targets`` (ids, any shape)."""
    _, counts = np.unique(targets, return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def unigram_cross_entropy(training: np.ndarray, targets: np.ndarray, vocab_size: int) -> float:
    """Mean nll of ``targets`` under the add-one counts of ``training`` (ids, any shapes)."""
    counts = np.bincount(training.ravel(), minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[targets.ravel()].mean())


@dataclass(frozen=True)
class KneserNeyBigram:
    """An interpolated Kneser-Ney bigram model; made by ``fit``.

    Attributes:
        vocab_size: V; every token has a positive probability in every context.
        codes: int64 ``[bigrams]``, sorted ``previous * V + token`` of each bigram seen.
        discounted: float64 ``[bigrams]``, its count less the discount, over its context's count.
        backoff: float64 ``[V]``, the weight of ``lower`` after each previous token; 1 if never seen.
        lower: float64 ``[V]``, the continuation distribution, itself smoothed with 1 / V.
    """

    vocab_size: int
    codes: np.ndarray
    discounted: np.ndarray
    backoff: np.ndarray
    lower: np.ndarray

    @classmethod
    def fit(cls, documents: Iterable[np.ndarray], vocab_size: int) -> KneserNeyBigram:
        """Count the bigrams inside each document (ids ``[tokens]``); none spans two documents."""
        pairs = [np.asarray(d[:-1], dtype=np.int64) * vocab_size + d[1:] for d in documents if len(d) > 1]
        codes, counts = np.unique(np.concatenate(pairs or [np.empty(0, np.int64)]), return_counts=True)
        previous, token = np.divmod(codes, vocab_size)
        context = np.bincount(previous, weights=counts, minlength=vocab_size)
        followers = np.bincount(previous, minlength=vocab_size)
        discount = _discount(counts)
        seen = np.maximum(context, 1)
        backoff = np.where(context > 0, discount * followers / seen, 1.0)

        contexts = np.bincount(token, minlength=vocab_size)
        lower_discount = _discount(contexts[contexts > 0])
        held = np.maximum(contexts - lower_discount, 0.0)
        total = max(len(codes), 1)
        lower = held / total + (1.0 - held.sum() / total) / vocab_size
        return cls(vocab_size, codes, (counts - discount) / seen[previous], backoff, lower)

    def probability(self, previous: np.ndarray, token: np.ndarray) -> np.ndarray:
        """P(token | previous) elementwise, float64; the shapes are those of the arguments."""
        codes = np.asarray(previous, dtype=np.int64) * self.vocab_size + token
        result = self.backoff[previous] * self.lower[token]
        if len(self.codes):
            found = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
            result = result + np.where(self.codes[found] == codes, self.discounted[found], 0.0)
        return result

    def mean_nll(self, previous: np.ndarray, token: np.ndarray) -> float:
        """Mean negative log likelihood of ``token`` after ``previous`` (ids ``[pairs]`` each)."""
        return float(-np.log(self.probability(previous, token)).mean())


def _discount(counts: np.ndarray) -> float:
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    # Without both, the estimate is 0 or 1, which leaves nothing for unseen or for seen tokens.
    return once / (once + 2 * twice) if once and twice else 0.5
