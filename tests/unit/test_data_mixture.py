"""Mixtures: exact quotas, within one at any draw, and closed-form counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roformer_dist.data.mixture import BLOCK, Mixture, quotas_of

some_quotas = st.lists(st.integers(1, 60), min_size=1, max_size=7)


@given(quotas=some_quotas)
@settings(deadline=None)
def test_every_source_is_within_one_of_its_share_at_any_draw(quotas: list[int]) -> None:
    mixture = Mixture(quotas)
    draws = 2 * mixture.block + 3
    source, _ = mixture.draw(np.arange(draws))
    counts = np.cumsum(source[:, None] == np.arange(len(quotas)), axis=0)
    share = np.arange(1, draws + 1)[:, None] * np.array(quotas) / sum(quotas)
    assert (np.abs(counts - share) < 1).all()
    # Exact at the end of each block.
    for block in (1, 2):
        assert counts[block * mixture.block - 1].tolist() == (block * mixture.quotas).tolist()


@given(quotas=some_quotas, start=st.integers(0, 10**12))
@settings(deadline=None)
def test_the_number_of_a_draw_in_its_source_is_how_often_it_was_drawn_before(
    quotas: list[int], start: int
) -> None:
    mixture = Mixture(quotas)
    numbers = np.arange(start, start + 100)
    source, count = mixture.draw(numbers)
    expected = mixture.counts(start)
    for chosen, number in zip(source.tolist(), count.tolist()):
        assert number == expected[chosen]
        expected[chosen] += 1
    assert mixture.counts(start + 100).tolist() == expected.tolist()
    shuffled = np.random.default_rng(0).permutation(100)
    assert mixture.draw(numbers[shuffled])[1].tolist() == count[shuffled].tolist()


def test_a_common_factor_does_not_change_the_pattern() -> None:
    assert Mixture([6, 3, 9]).block == 6
    # By hand: the third is due first (1/3); then it is not behind, and so on; at draw 3 the first two tie.
    source, count = Mixture([6, 3, 9]).draw(np.arange(12))
    assert source.tolist() == [2, 0, 2, 0, 1, 2] * 2
    assert count.tolist() == [0, 0, 1, 1, 0, 2, 3, 2, 4, 3, 1, 5]


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [
        ([1.0], [10_000]),
        ([0.6, 0.25, 0.15], [6000, 2500, 1500]),
        ([0.1, 0.1, 0.1], [3334, 3333, 3333]),
        ([3, 1], [7500, 2500]),
        ([0.00015, 0.99985], [2, 9998]),  # a tie, that no binary number is
        ([1e-05, 1.0], [0, 10_000]),
        ([2e-4, 1e4], [0, 10_000]),
    ],
)
def test_quotas_are_the_largest_remainders_of_the_decimals(weights: list[float], quotas: list[int]) -> None:
    assert quotas_of(weights) == quotas
    assert sum(quotas) == BLOCK


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9))
def test_quotas_are_within_one_of_the_weights(weights: list[float]) -> None:
    shares = BLOCK * np.array(weights) / sum(weights)
    assert (np.abs(np.array(quotas_of(weights)) - shares) < 1 + 1e-6).all()
    assert sum(quotas_of(weights)) == BLOCK
