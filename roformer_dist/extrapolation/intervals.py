"""Means of token losses with intervals that know that tokens of one document are not independent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_T_FEW = {1: 12.706, 2: 4.303}


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` targets in ``clusters`` documents, and its 95 % interval; in nats.

    ``low`` and ``high`` are NaN where a single cluster leaves no interval.
    """

    mean: float
    low: float
    high: float
    n: int
    clusters: int

    @property
    def perplexity(self) -> tuple[float, float, float]:
        """``exp`` of (mean, low, high)."""
        mean, low, high = (float(np.exp(value)) for value in (self.mean, self.low, self.high))
        return mean, low, high

    @property
    def interval(self) -> list[float] | None:
        """``[low, high]``, None where there is none: for JSON, which has no NaN."""
        return None if math.isnan(self.low) else [self.low, self.high]

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below 0, otherwise 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def clustered_mean(values: np.ndarray, clusters: np.ndarray) -> Estimate:
    """The mean of ``values`` and its interval, clustered.

    Every value weighs the same, so a cluster weighs as much as it has values. The standard error is
    the linearised one of a ratio, ``sqrt(G / (G - 1) * sum_g r_g ** 2) / n`` with
    ``r_g = sum over cluster g of (value - mean)`` (Cameron and Miller 2015, section II), times
    Student's t at ``G - 1`` degrees of freedom.

    Args:
        values: float ``[n]``.
        clusters: int ``[n]``, which cluster each value belongs to; any numbers.

    Raises:
        ValueError: there are no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("there are no targets to average over")
    _, index = np.unique(clusters, return_inverse=True)
    values = np.asarray(values, dtype=np.float64)
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    mean = sums.sum() / n
    groups = len(counts)
    if groups == 1:
        return Estimate(float(mean), math.nan, math.nan, n, 1)
    residuals = sums - mean * counts
    error = math.sqrt(groups / (groups - 1) * float((residuals**2).sum())) / n
    half = student_t_975(groups - 1) * error
    return Estimate(float(mean), float(mean - half), float(mean + half), n, groups)


def student_t_975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, within 0.03 of the exact value.

    Two values from the table, then the expansion around the normal quantile (Abramowitz and Stegun,
    26.7.5), so that no statistics package is needed for one number.
    """
    if freedom in _T_FEW:
        return _T_FEW[freedom]
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
