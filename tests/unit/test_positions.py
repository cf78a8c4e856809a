"""Positions beside the rotation: T5's buckets, ALiBi's slopes, learned and sinusoidal vectors; linear features."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from roformer_dist.config.layers import RelativeBiasPosition
from roformer_dist.model.linear_attention import features
from roformer_dist.model.positions import (
    LearnedPositions,
    RelativeBias,
    SinusoidalPositions,
    alibi_bias,
    alibi_slopes,
    relative_buckets,
)


def bucket(distance: int, buckets: int, max_distance: int, *, causal: bool) -> int:
    """T5's rule in whole numbers, where no rounding moves an edge.

    Below half of the buckets each distance has one; bucket exact + j begins at exact * (max / exact) ** (j / rest).
    """
    count = buckets if causal else buckets // 2
    upper = count if not causal and distance < 0 else 0
    n = max(distance, 0) if causal else abs(distance)
    exact = count // 2
    rest = count - exact
    if n < exact:
        return upper + n
    return upper + exact + sum(n**rest * exact**j >= max_distance**j * exact**rest for j in range(1, rest))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 256), (8, 20), (4, 3)])
def test_buckets_are_those_of_t5(buckets: int, max_distance: int, causal: bool) -> None:
    distances = torch.arange(-400, 401)
    found = relative_buckets(distances, buckets, max_distance, causal=causal).tolist()
    assert found == [bucket(d, buckets, max_distance, causal=causal) for d in distances.tolist()]
    assert set(found) == set(range(buckets)) - (set() if causal else {buckets // 2})


def test_buckets_of_t5_as_published() -> None:
    # Both ways, 32 buckets up to 128: keys after the query have the upper half; 8 to 127 share 8 of 16.
    edges = {
        0: 0,
        7: 7,
        8: 8,
        11: 8,
        12: 9,
        16: 10,
        32: 12,
        64: 14,
        90: 14,
        91: 15,
        127: 15,
        128: 15,
        5000: 15,
    }
    distances = torch.tensor(list(edges))
    assert relative_buckets(distances, 32, 128, causal=False).tolist() == list(edges.values())
    assert relative_buckets(-distances[1:], 32, 128, causal=False).tolist() == [
        16 + b for d, b in edges.items() if d
    ]


def test_a_relative_bias_is_looked_up_by_head_and_bucket() -> None:
    module = RelativeBias(RelativeBiasPosition(kind="relative_bias", num_buckets=8, max_distance=20), 3)
    bias = module(torch.arange(5)[None], torch.arange(5)[None], causal=True)
    distance = torch.arange(5)[:, None] - torch.arange(5)
    term = bias.function(bias.values, distance)
    assert torch.equal(term[2, 4, 1], module.table.weight[bucket(3, 8, 20, causal=True), 2])
    assert term.shape == (3, 5, 5)


@pytest.mark.parametrize(
    ("heads", "exponents"),
    [
        (1, [8]),
        (2, [4, 8]),
        (3, [4, 8, 2]),
        (6, [2, 4, 6, 8, 1, 3]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
        (16, [i / 2 for i in range(1, 17)]),
    ],
)
def test_slopes_are_those_of_alibi(heads: int, exponents: list[float]) -> None:
    assert alibi_slopes(heads).tolist() == pytest.approx([2**-e for e in exponents], rel=1e-7)


@pytest.mark.parametrize("heads", [5, 20, 40, 71])
def test_every_head_has_a_slope_of_its_own(heads: int) -> None:
    slopes = alibi_slopes(heads)
    assert len(set(slopes.tolist())) == heads
    assert (slopes > 0).all()


def test_alibi_is_minus_slope_times_distance_to_either_side() -> None:
    bias = alibi_bias(torch.arange(4)[None], torch.arange(4)[None], 2)
    term = bias.function(bias.values, torch.tensor([[3, 0, -2]]))
    assert torch.equal(
        term, -torch.tensor([1 / 16, 1 / 256])[:, None, None] * torch.tensor([[3.0, 0.0, 2.0]])
    )
    assert not bias.values.requires_grad


def test_a_position_without_a_learned_vector_is_one_line() -> None:
    learned = LearnedPositions(8, 4)
    assert torch.equal(learned(torch.tensor([[7, 0]])), learned.table.weight[[7, 0]][None])
    for positions, words in (
        (torch.arange(9)[None], "position 8 has no learned vector: model.position.max_seq_len = 8 ends at 7"),
        (torch.tensor([[0.5]]), "model.position.kind = 'learned' has no vectors for fractional positions"),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            learned(positions)
        assert str(caught.value) == words


def test_sinusoids_are_those_of_the_transformer_at_any_position() -> None:
    places: list[Any] = [0, 1, 2.5, 1_000_003]
    found = SinusoidalPositions(6, 0.25)(torch.tensor([places], dtype=torch.float64))
    for row, place in zip(found[0].tolist(), places, strict=True):
        angles = [place / 10000 ** (2 * i / 6) for i in range(3)]
        assert row == pytest.approx([0.25 * f(a) for a in angles for f in (math.sin, math.cos)], abs=1e-7)
    # float64 keeps distances apart that float32 angles would not.
    assert found.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_positive_whatever_comes(dtype: torch.dtype) -> None:
    # exp(200) would be infinite.
    x = torch.tensor([[[[-60.0, -17.5, -1.0, 0.0, 2.0, 60.0, 200.0]]]], dtype=dtype, requires_grad=True)
    q, k = features(x, x, "elu")
    assert torch.equal(q, k)
    rel = 1e-6 if dtype == torch.float32 else 2**-8
    expected = [math.exp(v) if v < 0 else v + 1 for v in x.flatten().tolist()]
    assert q.flatten().tolist() == pytest.approx(expected, rel=rel)
    assert (q > 0).all()
    (grad,) = torch.autograd.grad(q.sum(), x)
    assert grad.flatten().tolist() == pytest.approx([min(v, 1.0) for v in expected], rel=rel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_features_are_weights_of_the_query_and_exponentials_of_the_key(dtype: torch.dtype) -> None:
    x = torch.tensor([[[[-20.0, -1.0, 0.0, 2.0, 20.0]]]], dtype=dtype)
    q, k = features(x, x, "softmax")
    rel = 1e-6 if dtype == torch.float32 else 2**-8
    values = x.flatten().tolist()
    total = sum(math.exp(v) for v in values)
    assert q.flatten().tolist() == pytest.approx([math.exp(v) / total for v in values], rel=rel)
    assert k.flatten().tolist() == pytest.approx([math.exp(v) for v in values], rel=rel)
    assert (q.dtype, k.dtype) == (dtype, dtype)
