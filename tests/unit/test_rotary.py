"""Rotation against its definition: the dense matrix of RoFormer, equation 15."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

from roformer_dist.config.rope import LinearScaling, RopeConfig, YarnScaling
from roformer_dist.kernels.rotation import Pairing, rotate
from roformer_dist.model.rotary import Rotary

HEAD_DIM = 16
PAIRINGS: list[Pairing] = ["interleaved", "half"]
# Whole and fractional positions, and some beyond a million, where float32 angles are wrong by 0.06 radian.
POSITIONS = [0.0, 1.0, 2.0, 0.25, 3.5, 511.0, 65_537.0, 1_000_000.0, 1_000_003.0, 1_234_567.75, 9_999_999.5]


def pair_of(i: int, pairing: Pairing) -> tuple[int, int]:
    return (2 * i, 2 * i + 1) if pairing == "interleaved" else (i, i + HEAD_DIM // 2)


def dense_rotation(position: float, pairing: Pairing, theta: float = 10000.0) -> Tensor:
    """R of equation 15: block-diagonal, theta_i = theta ** (-2 (i - 1) / d) for i = 1..d/2; float64."""
    matrix = torch.zeros(HEAD_DIM, HEAD_DIM, dtype=torch.float64)
    for i in range(HEAD_DIM // 2):
        angle = position * theta ** (-2 * i / HEAD_DIM)
        a, b = pair_of(i, pairing)
        matrix[a, a] = matrix[b, b] = math.cos(angle)
        matrix[a, b], matrix[b, a] = -math.sin(angle), math.sin(angle)
    return matrix


def rotary(pairing: Pairing = "interleaved", **changes) -> Rotary:
    return Rotary(RopeConfig(pairing=pairing, **changes), HEAD_DIM)


def permuted(x_half: Tensor) -> Tensor:
    """Channels in the order of the half pairing put into that of the interleaved one."""
    return x_half.unflatten(-1, (2, HEAD_DIM // 2)).transpose(-1, -2).flatten(-2)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_rotation_is_the_dense_matrix_of_equation_15(pairing: Pairing, theta: float) -> None:
    x = torch.randn(1, len(POSITIONS), 3, HEAD_DIM)
    positions = torch.tensor([POSITIONS], dtype=torch.float64)
    turned = rotary(pairing, theta=theta).phases(positions).rotate(x)
    matrices = torch.stack([dense_rotation(p, pairing, theta) for p in POSITIONS])
    expected = torch.einsum("sij,rshj->rshi", matrices, x.double())
    # cos, sin, two products and a sum are each rounded to float32 (6e-8); 4e-7 of the vector covers them.
    assert (turned.double() - expected).abs().max() <= 4e-7 * x.norm(dim=-1).max()


def test_integer_positions_are_the_same_as_whole_fractions() -> None:
    x = torch.randn(1, 4, 2, HEAD_DIM)
    places = [0, 7, 1_000_001, 123_456_789]
    integers = rotary().phases(torch.tensor([places])).rotate(x)
    fractions = rotary().phases(torch.tensor([places], dtype=torch.float64)).rotate(x)
    assert torch.equal(integers, fractions)


def test_interleaved_is_half_after_the_permutation_of_channels() -> None:
    x = torch.randn(2, 5, 3, HEAD_DIM)
    positions = torch.randint(0, 2_000_000, (2, 5))
    half = rotary("half").phases(positions).rotate(x)
    interleaved = rotary("interleaved").phases(positions).rotate(permuted(x))
    # The same products and sums of the same numbers; a fused multiply-add rounds once where others round twice.
    torch.testing.assert_close(interleaved, permuted(half), rtol=0, atol=2**-22 * float(x.abs().max()))
    assert not torch.equal(interleaved, permuted(x))


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_rotation_keeps_the_norm_of_every_pair(pairing: Pairing) -> None:
    x = torch.randn(1, 64, 2, HEAD_DIM)
    turned = rotary(pairing).phases(torch.randint(0, 10_000_000, (1, 64))).rotate(x)
    for i in range(HEAD_DIM // 2):
        pair = list(pair_of(i, pairing))
        before, after = x[..., pair].double().norm(dim=-1), turned[..., pair].double().norm(dim=-1)
        assert ((after - before).abs() <= 3e-7 * before).all()


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_backward_is_the_transposed_rotation(pairing: Pairing) -> None:
    x = torch.randn(2, 6, 3, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    positions = torch.randint(0, 5000, (2, 6))
    phases = rotary(pairing).phases(positions)
    (found,) = torch.autograd.grad(rotate(x, phases.cos, phases.sin, pairing), x, grad)

    # A plain implementation that autograd differentiates: pairs as complex numbers times e^{i angle}.
    pairs = (
        x.unflatten(-1, (-1, 2)) if pairing == "interleaved" else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    )
    turn = torch.complex(phases.cos.double(), phases.sin.double())[:, :, None]
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    plain = turned.flatten(-2) if pairing == "interleaved" else turned.transpose(-1, -2).flatten(-2)
    (expected,) = torch.autograd.grad(plain, x, grad)
    assert (found - expected).abs().max() <= 1e-14 * grad.abs().max() * 10

    matrices = torch.stack([dense_rotation(float(p), pairing) for p in positions.flatten()])
    transposed = torch.einsum("tij,thi->thj", matrices, grad.flatten(0, 1))
    # cos and sin are kept as float32.
    assert (found.flatten(0, 1) - transposed).abs().max() <= 2e-7 * grad.norm(dim=-1).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_returns_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    x = torch.randn(1, 3, 2, HEAD_DIM, dtype=dtype, requires_grad=True)
    y = rotary().phases(torch.arange(3)[None]).rotate(x)
    y.sum().backward()
    assert y.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_bf16_vectors_are_rotated_in_float32_and_rounded_once(pairing: Pairing) -> None:
    x = torch.randn(1, 64, 2, HEAD_DIM).bfloat16()
    phases = rotary(pairing).phases(torch.arange(64)[None])
    assert torch.equal(phases.rotate(x), phases.rotate(x.float()).bfloat16())


def shifted_scores(shift: int, dtype: torch.dtype, pairing: Pairing) -> tuple[Tensor, Tensor]:
    """Scores of all pairs of 48 places, in float64 from vectors rotated in ``dtype``, and |q||k|."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 48, 1, HEAD_DIM, generator=generator).to(dtype) for _ in range(2))
    phases = rotary(pairing).phases(torch.arange(48)[None] * 17 + shift)
    rotated_q, rotated_k = (phases.rotate(x)[0, :, 0].double() for x in (q, k))
    norms = q[0, :, 0].double().norm(dim=-1)[:, None] * k[0, :, 0].double().norm(dim=-1)
    return rotated_q @ rotated_k.T, norms


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        (torch.float32, 1e-6),
        # Rounding a vector to bf16 moves it by at most 2^-9 of its length: two vectors, before and after
        # the shift, make 4 * 2^-9. Angles in bf16 would move scores by the scores themselves.
        (torch.bfloat16, 2**-7),
    ],
)
def test_shifting_all_positions_by_a_million_changes_no_score(
    dtype: torch.dtype, bound: float, pairing: Pairing
) -> None:
    here, norms = shifted_scores(0, dtype, pairing)
    there, _ = shifted_scores(1_000_000, dtype, pairing)
    assert ((there - here).abs() <= bound * norms).all()
    # And the rotation is one: turning only the queries does change scores.
    assert (here - shifted_scores(0, torch.float32, pairing)[0].T).abs().max() > 0.1


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(HEAD_DIM), torch.randn(HEAD_DIM)
    # Pairs (m, n) of the same m - n = 5, near and far.
    places = torch.tensor([[5, 105, 70_005, 3_000_005], [0, 100, 70_000, 3_000_000]])
    phases = rotary().phases(places)
    turned = phases.rotate(torch.stack([q, k])[:, None, None, :].expand(2, 4, 1, HEAD_DIM))
    scores = (turned[0].double() * turned[1].double()).sum(-1)
    assert (scores - scores[0]).abs().max() <= 1e-6 * q.norm() * k.norm()


@pytest.mark.parametrize("place", [2**31, 2**31 - 1, 2**24 + 1, 2**31 + 0.25], ids=str)
def test_angles_are_right_up_to_two_billion(place: float) -> None:
    positions = torch.tensor([[place]], dtype=torch.int64 if isinstance(place, int) else torch.float64)
    phases = rotary().phases(positions)
    with localcontext() as context:
        context.prec = 50
        turn = 2 * Decimal("3.14159265358979323846264338327950288419716939937510582")
        angles = [
            float(Decimal(place) * Decimal(10000) ** (Decimal(-2 * i) / HEAD_DIM) % turn)
            for i in range(HEAD_DIM // 2)
        ]
    # A frequency and a product, each rounded to 2^-53 of an angle of up to 2^31, and the rounding to float32.
    bound = 2 * 2.0 ** (31 - 53) + 2.0**-24
    assert phases.cos.flatten().tolist() == pytest.approx([math.cos(a) for a in angles], rel=0, abs=bound)
    assert phases.sin.flatten().tolist() == pytest.approx([math.sin(a) for a in angles], rel=0, abs=bound)


def test_phases_are_float32_and_frequencies_float64_whatever_the_default_dtype() -> None:
    rope = rotary()
    assert rope.inv_freq.dtype == torch.float64
    phases = rope.phases(torch.arange(4)[None])
    assert (phases.cos.dtype, phases.sin.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize(("factor", "on_scores"), [(8.0, 1.459), (16.0, 1.631), (32.0, 1.813)])
def test_yarn_multiplies_scores_by_the_square_of_its_factor(factor: float, on_scores: float) -> None:
    x = torch.randn(1, 8, 2, HEAD_DIM)
    scaled = rotary(scaling=YarnScaling(kind="yarn", factor=factor, original_seq_len=512))
    turned = scaled.phases(torch.arange(8)[None] * 1000).rotate(x)
    assert (turned.norm(dim=-1) / x.norm(dim=-1)) ** 2 == pytest.approx(
        torch.full((1, 8, 2), on_scores), rel=4e-4
    )
    # Exactly 0.1 ln s + 1 on cos and sin.
    assert scaled.factor == pytest.approx(0.1 * math.log(factor) + 1, rel=1e-12)


def test_linear_scaling_is_a_fraction_of_the_position() -> None:
    x = torch.randn(1, 6, 2, HEAD_DIM)
    positions = torch.tensor([[0, 1, 5, 9, 300, 4001]])
    scaled = rotary(scaling=LinearScaling(kind="linear", factor=4.0)).phases(positions).rotate(x)
    assert torch.equal(scaled, rotary().phases(positions / 4).rotate(x))


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_partial_rotation_of_a_long_row_is_that_of_its_tokens(pairing: Pairing) -> None:
    # Longer than what is turned at a time.
    x = torch.randn(2, 700, 3, HEAD_DIM, requires_grad=True)
    positions = torch.arange(1400).view(2, 700) / 4
    turned = rotary(pairing, partial=0.5).phases(positions).rotate(x)
    alone = Rotary(RopeConfig(pairing=pairing), HEAD_DIM // 2)
    parts = [
        alone.phases(p).rotate(part[..., : HEAD_DIM // 2])
        for p, part in zip(positions.split(100, 1), x.split(100, 1))
    ]
    torch.testing.assert_close(turned[..., : HEAD_DIM // 2], torch.cat(parts, 1), rtol=0, atol=2**-21)
    assert torch.equal(turned[..., HEAD_DIM // 2 :], x[..., HEAD_DIM // 2 :])
    (grad,) = torch.autograd.grad(turned[..., HEAD_DIM // 2 :].sum(), x)
    assert torch.equal(grad, (torch.arange(HEAD_DIM) >= HEAD_DIM // 2).float().expand_as(x))
