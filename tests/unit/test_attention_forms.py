"""Parts, biased and linear attention against their dense float64 definitions, forward and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels import biased, linear
from roformer_dist.kernels.attention import Kernel, ScoreBias, ScorePart
from roformer_dist.kernels.reference import ReferenceKernel
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.parallel.sequence_ops import single_sequence_ops

LENGTHS = [5, 1, 13, 2]
TOKENS = sum(LENGTHS)
SCALE = 0.6
# Relative to the largest number: some hundred roundings of 6e-8; bf16 rounds inputs, results and gradients by 2^-9.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2**-6}
OPS = single_sequence_ops(SdpaKernel())


def leaf(heads: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, TOKENS, heads, 8, generator=generator).to(dtype).requires_grad_()


def visible(mask: MaskSpec) -> Tensor:
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.cat([torch.arange(n) for n in LENGTHS])
    distance = place[:, None] - place
    seen = (document[:, None] == document) & ~(mask.causal & (distance < 0))
    if mask.window is not None:
        seen &= distance.abs() < mask.window
    return seen & (distance >= mask.min_distance) if mask.min_distance is not None else seen


def scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("rtnd,rund->rntu", q, k.repeat_interleave(q.shape[2] // k.shape[2], dim=2))


def softmax_attention(dense: Tensor, seen: Tensor, v: Tensor) -> Tensor:
    weights = dense.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("rntu,rund->rtnd", weights, v.repeat_interleave(dense.shape[1] // v.shape[2], dim=2))


def assert_same(out: Tensor, expected: Tensor, leaves: list[Tensor], reference: list[Tensor]) -> None:
    tolerance = TOLERANCE[out.dtype]
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    found = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    wanted = torch.autograd.grad(expected, reference, dout.to(out.dtype).double())
    pairs = [(out.detach(), expected.detach()), *zip(found, wanted, strict=True)]
    for i, (got, want) in enumerate(pairs):
        error = (got.double() - want).abs().max()
        assert error <= tolerance * max(1.0, want.abs().max()), (i, error, want.abs().max())


def doubles(leaves: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in leaves]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel", [SdpaKernel(), ReferenceKernel()], ids=lambda k: k.name)
@pytest.mark.parametrize("near", [1, 3, 40])
def test_parts_are_one_softmax_over_regions(kernel: Kernel, near: int, dtype: torch.dtype) -> None:
    mask = MaskSpec.from_lengths(LENGTHS, causal=True)
    leaves = [leaf(heads, i, dtype) for i, heads in enumerate((4, 2, 4, 2, 2))]
    q, k, q_far, k_far, v = leaves
    regions = replace(mask, window=near), replace(mask, min_distance=near)
    parts = [ScorePart(q, k, regions[0]), ScorePart(q_far, k_far, regions[1])]
    out = single_sequence_ops(kernel).attend_parts(parts, v, SCALE)

    reference = doubles(leaves)
    q, k, q_far, k_far, v = reference
    dense = torch.where(visible(regions[0]), scores(q, k), scores(q_far, k_far)) * SCALE
    assert_same(out, softmax_attention(dense, visible(mask), v), leaves, reference)


def table_bias(values: Tensor, distance: Tensor) -> Tensor:
    return values[:, distance.clamp(-3, 4) + 3]


@pytest.mark.parametrize("tile_scores", [8, 100, 2**22])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_a_bias_is_added_and_has_a_gradient(
    causal: bool, window: int | None, dtype: torch.dtype, tile_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(biased, "TILE_SCORES", tile_scores)
    mask = MaskSpec.from_lengths(LENGTHS, causal=causal, window=window)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    leaves = [leaf(heads, i, dtype) for i, heads in enumerate((4, 2, 2))]
    leaves.append(torch.randn(4, 8, generator=torch.Generator().manual_seed(7)).to(dtype).requires_grad_())
    q, k, v, table = leaves
    bias = ScoreBias(table, table_bias, positions, positions)
    out = OPS.attend_biased(q, k, v, mask, SCALE, bias)

    reference = doubles(leaves)
    q, k, v, table = reference
    term = table_bias(table, positions[0, :, None] - positions[0])
    dense = scores(q, k) * SCALE + term
    assert_same(out, softmax_attention(dense, visible(mask), v), leaves, reference)


def test_a_fixed_bias_asks_for_no_gradient() -> None:
    mask = MaskSpec.from_lengths(LENGTHS, causal=True)
    positions = torch.arange(TOKENS)[None]
    table, recorded = torch.randn(4, 8), []
    q, k, v = (leaf(4, i, torch.float32) for i in range(3))

    def noted(values: Tensor, distance: Tensor) -> Tensor:
        recorded.append(torch.is_grad_enabled())
        return table_bias(values, distance)

    OPS.attend_biased(q, k, v, mask, SCALE, ScoreBias(table, noted, positions, positions)).sum().backward()
    assert table.grad is None
    assert not any(recorded)
    assert all(x.grad is not None for x in (q, k, v))


def test_a_window_bounds_the_tiles_of_a_bias() -> None:
    mask = MaskSpec.from_lengths([4000], causal=True, window=100)
    tiles = biased._tiles(mask, torch.empty(4000, 1, 8))
    assert sum(hidden.numel() for *_, hidden in tiles) <= 2 * 4000 * 100


def test_a_query_that_sees_no_key_gives_0_and_no_nan() -> None:
    mask = replace(MaskSpec.from_lengths(LENGTHS, causal=True), min_distance=1)
    leaves = [leaf(heads, i) for i, heads in enumerate((4, 2, 2))]
    q, k, v = leaves
    positions = torch.arange(TOKENS)[None]
    parts = [ScorePart(q, k, replace(mask, window=3)), ScorePart(q, k, replace(mask, min_distance=3))]
    bias = ScoreBias(torch.zeros(4, 8), table_bias, positions, positions)
    reference = doubles(leaves)
    expected = single_sequence_ops(ReferenceKernel()).attend(*reference, mask, SCALE)
    assert expected[0, torch.tensor([0, 5, 6, 19])].eq(0).all()
    for out in (OPS.attend_parts(parts, v, SCALE), OPS.attend_biased(q, k, v, mask, SCALE, bias)):
        assert out.isfinite().all()
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).double()
        found = torch.autograd.grad(out, leaves, dout)
        wanted = torch.autograd.grad(expected, reference, dout, retain_graph=True)
        for got, want in zip((out, *found), (expected, *wanted), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def linear_reference(streams: list[Tensor], seen: Tensor) -> Tensor:
    q_rotated, k_rotated, q, k, v = streams
    numerator = scores(q_rotated, k_rotated) * seen
    denominator = (scores(q, k) * seen).sum(-1)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return torch.einsum("rntu,rund->rtnd", numerator / denominator[..., None], v)


@pytest.mark.parametrize("chunk", [1, 4, 128])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("causal", [True, False])
def test_recurrent_and_chunked_linear_attention_are_the_quadratic_form(
    causal: bool, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "CHUNK", chunk)
    mask = MaskSpec.from_lengths(LENGTHS, causal=causal)
    leaves = [leaf(heads, i, dtype) for i, heads in enumerate((4, 2, 4, 2, 2))]
    leaves[2:4] = [x.detach().exp().requires_grad_() for x in leaves[2:4]]  # feature maps are positive
    out = OPS.linear_attend(*leaves, mask)
    reference = doubles(leaves)
    assert_same(out, linear_reference(reference, visible(mask)), leaves, reference)


@pytest.mark.parametrize("causal", [True, False])
def test_pieces_of_a_document_that_pass_states_are_the_whole(causal: bool) -> None:
    # What processes that share a sequence do: one state from each piece, forward and backward.
    generator = torch.Generator().manual_seed(0)
    q_rotated, q, dout = (torch.randn(TOKENS, 4, 8, generator=generator).double() for _ in range(3))
    k_rotated, k, v = (torch.randn(TOKENS, 2, 8, generator=generator).double() for _ in range(3))
    streams = linear.Streams(q_rotated, k_rotated, q.exp(), k.exp(), v)
    nothing = linear.empty_state(streams)
    numerator, denominator = linear.document_forward(streams, nothing, causal=causal)
    out = numerator / denominator[..., None]
    d_whole = linear.sum_gradients(dout, out, denominator)
    whole = linear.document_backward(streams, *d_whole, nothing, nothing, causal=causal)

    cuts = [slice(0, 6), slice(6, 7), slice(7, TOKENS)]
    pieces = [streams.cut(cut) for cut in cuts]

    def others(states: list[linear.LinearState], i: int, *, earlier: bool) -> linear.LinearState:
        total = linear.empty_state(streams)
        for j, state in enumerate(states):
            if j != i and (not causal or (j < i) == earlier):
                total += state
        return total

    keys = [linear.key_state(piece) for piece in pieces]
    sums = [
        linear.document_forward(p, others(keys, i, earlier=True), causal=causal) for i, p in enumerate(pieces)
    ]
    outs = [numerator / part[..., None] for numerator, part in sums]
    torch.testing.assert_close(torch.cat(outs), out, rtol=1e-12, atol=1e-12)

    d_sums = [linear.sum_gradients(dout[cut], outs[i], sums[i][1]) for i, cut in enumerate(cuts)]
    queries = [linear.query_state(piece, *d) for piece, d in zip(pieces, d_sums)]
    grads = [
        linear.document_backward(
            piece,
            *d_sums[i],
            others(keys, i, earlier=True),
            others(queries, i, earlier=False),
            causal=causal,
        )
        for i, piece in enumerate(pieces)
    ]
    for parts, expected in zip(zip(*grads), whole):
        torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-11, atol=1e-11)


def test_pooling_is_a_weighted_sum_over_each_row() -> None:
    x, weights = torch.randn(2, 5, 3, requires_grad=True), torch.rand(2, 5)
    pooled = OPS.pool(x, weights)
    torch.testing.assert_close(pooled, (x * weights[..., None]).sum(1))
    assert OPS.share == 1.0
