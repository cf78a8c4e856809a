import math

import numpy as np
import pytest
from test_data_tiny import VOCAB_SIZE, tiny

from roformer_dist.data.baselines import KneserNeyBigram, unigram_cross_entropy, unigram_entropy
from roformer_dist.data.store import documents


def test_unigram_by_hand():
    targets = np.array([[0, 0], [1, 2]])
    assert unigram_entropy(targets) == pytest.approx(1.5 * math.log(2))
    # Counts 2, 1, 0 of 3 tokens become 3/6, 2/6, 1/6.
    training = np.array([0, 0, 1])
    expected = -(2 * math.log(3 / 6) + math.log(2 / 6) + math.log(1 / 6)) / 4
    assert unigram_cross_entropy(training, targets, 3) == pytest.approx(expected)


def test_kneser_ney_by_hand():
    # Bigrams 0-1 twice, 0-2 once, 1-0 once: n1 = 2, n2 = 1, so the discount is 2 / 4.
    model = KneserNeyBigram.fit([np.array([0, 1, 0, 1]), np.array([0, 2])], 4)
    # Each of 1, 2, 0 follows one context: n2 = 0, so the lower discount is 0.5.
    lower = np.array([0.5 / 3] * 3 + [0.0]) + 0.5 / 4
    assert model.lower == pytest.approx(lower)
    weight = 0.5 * 2 / 3
    expected = np.array([0, 1.5 / 3, 0.5 / 3, 0]) + weight * lower
    assert model.probability(np.zeros(4, int), np.arange(4)) == pytest.approx(expected)
    assert model.probability(np.full(4, 3), np.arange(4)) == pytest.approx(lower)


def test_kneser_ney_sums_to_one_in_seen_and_unseen_contexts():
    model = KneserNeyBigram.fit(documents(tiny().store), VOCAB_SIZE)
    previous, token = (grid.ravel() for grid in np.mgrid[:VOCAB_SIZE, :VOCAB_SIZE])
    p = model.probability(previous, token).reshape(VOCAB_SIZE, VOCAB_SIZE)
    assert (p > 0).all()
    assert p.sum(1) == pytest.approx(np.ones(VOCAB_SIZE), abs=1e-12)
    assert (model.backoff == 1).any()
    assert (model.backoff < 1).any()


def test_kneser_ney_does_not_cross_documents_and_takes_empty_input():
    joined = KneserNeyBigram.fit([np.array([0, 1]), np.array([2, 3])], 4)
    assert joined.codes.tolist() == [0 * 4 + 1, 2 * 4 + 3]
    empty = KneserNeyBigram.fit([np.array([1])], 4)
    assert empty.probability(np.arange(4), np.arange(4)) == pytest.approx(np.full(4, 0.25))


def test_bigram_beats_unigram_where_tokens_follow_from_each_other():
    noise = np.random.default_rng(0).integers(0, 2, 20_000)
    chain = np.zeros(20_001, dtype=np.int64)
    for i, extra in enumerate(noise):
        chain[i + 1] = (3 * chain[i] + extra) % 50
    train, held = chain[:15_000], chain[15_000:]
    bigram = KneserNeyBigram.fit([train], 50).mean_nll(held[:-1], held[1:])
    assert bigram == pytest.approx(math.log(2), abs=0.02)
    assert unigram_cross_entropy(train, held[1:], 50) > bigram + 2
