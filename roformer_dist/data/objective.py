"""What the tokens of a row are asked to predict: inputs, labels and how many labels count.

Both objectives count over the same tokens: those that are not padding and not the last of their
document (its EOS). That is known from the plan, so any rank can count the targets of any row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from roformer_dist.batch import IGNORE_INDEX
from roformer_dist.data.errors import DataError
from roformer_dist.data.hashing import hash64, uniform
from roformer_dist.data.plan import Plan


@lru_cache(maxsize=4)
def counting(length: int) -> np.ndarray:
    """0 to ``length - 1``, int64, made once and read-only."""
    numbers = np.arange(length)
    numbers.flags.writeable = False
    return numbers


def slot_counters(slots: np.ndarray, seq_len: int, out: np.ndarray | None = None) -> np.ndarray:
    """``slot * seq_len + index`` for each token of each slot, int64 ``[slots, seq_len]``, in ``out`` if given."""
    return np.add(slots[:, None] * seq_len, counting(seq_len), out=out)


def piece_numbers(plan: Plan, rows: np.ndarray) -> np.ndarray:
    """Where the pieces of ``rows`` (int64 ``[n]``) are in the plan's piece arrays, in order."""
    plan.check_rows(rows)
    first, counts = plan.row_offsets[rows], plan.row_offsets[rows + 1] - plan.row_offsets[rows]
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(first - before, counts)


@dataclass(frozen=True)
class CausalObjective:
    """Predict the next token of the same document."""

    causal: ClassVar[bool] = True

    def apply(
        self, tokens: np.ndarray, next_tokens: np.ndarray, counters: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of a row, int64 ``[seq_len]`` each; ``next_tokens`` already ignores."""
        del counters, seed
        return tokens, next_tokens

    def count_valid(
        self, plan: Plan, rows: np.ndarray, slots: np.ndarray, seed: int, left_out: Sequence[int] = ()
    ) -> int:
        """Labels that count in ``rows`` without the documents ``left_out``, from the plan alone."""
        del slots, seed
        pieces = piece_numbers(plan, rows)
        if left_out:
            pieces = pieces[~np.isin(plan.document[pieces], left_out)]
        return int(plan.length[pieces].sum() - plan.ends_document[pieces].sum())


@dataclass(frozen=True)
class MaskedObjective:
    """Predict hidden tokens from both sides.

    Of the tokens that may count, each is hidden with ``mask_probability``. A hidden token becomes
    ``mask_id`` with probability ``replace_with_mask``, a uniformly drawn id with
    ``replace_with_random``, and stays as it is otherwise. All draws are pure functions of
    (seed, slot, index).

    Raises:
        DataError: a probability or id out of range.
    """

    mask_id: int
    vocab_size: int
    mask_probability: float = 0.15
    replace_with_mask: float = 0.8
    replace_with_random: float = 0.1
    causal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.mask_probability <= 1:
            raise DataError(f"mask_probability={self.mask_probability} must be above 0 and at most 1")
        kept = 1 - self.replace_with_mask - self.replace_with_random
        if min(self.replace_with_mask, self.replace_with_random) < 0 or kept < -1e-9:
            raise DataError(
                f"replace_with_mask={self.replace_with_mask} and replace_with_random="
                f"{self.replace_with_random} must not be negative nor exceed 1 together"
            )
        if not 0 <= self.mask_id < self.vocab_size:
            raise DataError(
                f"mask_id={self.mask_id} must be at least 0 and below vocab_size={self.vocab_size}"
            )

    def apply(
        self, tokens: np.ndarray, next_tokens: np.ndarray, counters: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of a row, int64 ``[seq_len]`` each; what has a next token may be hidden."""
        hidden = np.flatnonzero((next_tokens != IGNORE_INDEX) & self._drawn(counters, seed))
        # What happens to a token is drawn for the hidden ones only: a few of many.
        kind = uniform(hash64(seed, 1, counters[hidden]))
        masked = hidden[kind < self.replace_with_mask]
        random = hidden[
            (kind >= self.replace_with_mask) & (kind < self.replace_with_mask + self.replace_with_random)
        ]
        inputs, labels = tokens.copy(), np.full_like(tokens, IGNORE_INDEX)
        labels[hidden] = tokens[hidden]
        inputs[masked] = self.mask_id
        inputs[random] = (hash64(seed, 2, counters[random]) % np.uint64(self.vocab_size)).astype(np.int64)
        return inputs, labels

    def count_valid(
        self, plan: Plan, rows: np.ndarray, slots: np.ndarray, seed: int, left_out: Sequence[int] = ()
    ) -> int:
        """Labels that count in ``rows`` at ``slots`` without the documents ``left_out``, from plan and draws."""
        counters = slot_counters(slots, plan.seq_len)
        return sum(
            int((_has_target(plan, row, left_out) & self._drawn(counter, seed)).sum())
            for row, counter in zip(rows.tolist(), counters, strict=True)
        )

    def _drawn(self, counters: np.ndarray, seed: int) -> np.ndarray:
        return uniform(hash64(seed, 0, counters)) < self.mask_probability


def _has_target(plan: Plan, row: int, left_out: Sequence[int]) -> np.ndarray:
    """bool ``[seq_len]``: what may be predicted in a row without the documents ``left_out``."""
    result = plan.has_target(row)
    if left_out:
        pieces = plan.pieces(row)
        gone = np.isin(plan.document[pieces], left_out)
        text = np.repeat(gone, plan.length[pieces])
        result[: len(text)] &= ~text
    return result


Objective = CausalObjective | MaskedObjective
