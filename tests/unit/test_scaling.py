"""Frequency rules against formulas written out by hand, in Python floats, and against literal values."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from roformer_dist.config.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NoScaling,
    NtkScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from roformer_dist.model.rotary import Rotary
from roformer_dist.model.scaling import rope_frequencies


def frequencies(
    head_dim: int, scaling: RopeScaling, theta: float = 10000.0, length: float = 0
) -> tuple[list[float], float]:
    found, factor = rope_frequencies(RopeConfig(theta=theta, scaling=scaling), head_dim, length)
    assert found.dtype == torch.float64
    return found.tolist(), factor


def yarn(factor: float, original_seq_len: int, **changes: float) -> YarnScaling:
    return YarnScaling(kind="yarn", factor=factor, original_seq_len=original_seq_len, **changes)


def written_out_yarn(
    head_dim: int, theta: float, s: float, length: int, beta_fast: float = 32, beta_slow: float = 1
) -> list[float]:
    """Rope.md 2.3: dim(r) = d ln(L0 / (2 pi r)) / (2 ln theta), rounded outwards, a ramp between."""
    dims = [
        head_dim * math.log(length / (2 * math.pi * r)) / (2 * math.log(theta))
        for r in (beta_fast, beta_slow)
    ]
    low, high = max(math.floor(dims[0]), 0), min(math.ceil(dims[1]), head_dim - 1)
    expected = []
    for i in range(head_dim // 2):
        w = theta ** (-2 * i / head_dim)
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        expected.append(w / s * ramp + w * (1 - ramp))
    return expected


def test_plain_frequencies_are_powers_of_the_base() -> None:
    assert frequencies(8, NoScaling())[0] == pytest.approx([1.0, 0.1, 0.01, 0.001], rel=1e-15)
    found, factor = frequencies(64, NoScaling(), theta=500000.0)
    assert found == pytest.approx([500000.0 ** (-2 * i / 64) for i in range(32)], rel=1e-14)
    assert factor == 1.0


def test_linear_divides_every_frequency() -> None:
    assert frequencies(8, LinearScaling(kind="linear", factor=4.0)) == (
        pytest.approx([0.25, 0.025, 0.0025, 0.00025], rel=1e-15),
        1.0,
    )


def test_ntk_changes_the_base() -> None:
    # 8 ** (8 / 6) = 16, so the base becomes 160,000 = 20 ** 4.
    found, factor = frequencies(8, NtkScaling(kind="ntk", factor=8.0))
    assert found == pytest.approx([1, 1 / 20, 1 / 400, 1 / 8000], rel=1e-13)
    assert factor == 1.0
    changed = 10000.0 * 3.0 ** (64 / 62)
    assert frequencies(64, NtkScaling(kind="ntk", factor=3.0))[0] == pytest.approx(
        [changed ** (-2 * i / 64) for i in range(32)], rel=1e-13
    )


@pytest.mark.parametrize("head_dim", [4, 32, 128])
def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest(head_dim: int) -> None:
    plain, _ = frequencies(head_dim, NoScaling())
    scaled, _ = frequencies(head_dim, NtkScaling(kind="ntk", factor=6.0))
    assert scaled[0] == plain[0] == 1.0
    assert scaled[-1] == pytest.approx(plain[-1] / 6, rel=1e-13)


def test_ntk_of_a_single_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim > 2"):
        rope_frequencies(RopeConfig(scaling=NtkScaling(kind="ntk", factor=2.0)), 2)


def test_yarn_literal_values() -> None:
    # dim(32) = 0.41 and dim(1) = 1.91: the ramp runs from pair 0 to pair 2, so pair 1 is half-way.
    found, factor = frequencies(8, yarn(4.0, 512))
    assert found == pytest.approx([1.0, 0.1 * (0.5 + 0.5 / 4), 0.01 / 4, 0.001 / 4], rel=1e-14)
    assert factor == pytest.approx(1.138629436111989, rel=1e-15)


def test_yarn_ramps_of_a_llama_head_lie_between_pairs_20_and_46() -> None:
    plain, _ = frequencies(128, NoScaling())
    scaled, _ = frequencies(128, yarn(16.0, 4096))
    share = [new / old for new, old in zip(scaled, plain)]
    assert share[:21] == [1.0] * 21
    assert all(share[i] < 1.0 for i in range(21, 64))
    assert share[33] == pytest.approx(0.5 + 0.5 / 16, rel=1e-12)
    assert share[45] > 1 / 16 * 1.1
    assert share[46:] == pytest.approx([1 / 16] * 18, rel=1e-12)


@pytest.mark.parametrize(
    ("head_dim", "theta", "s", "length", "betas"),
    [
        (64, 10000.0, 16.0, 4096, {}),
        (128, 500000.0, 4.0, 8192, {}),
        (32, 10000.0, 2.5, 512, {"beta_fast": 16.0, "beta_slow": 2.0}),
    ],
)
def test_yarn_is_the_written_out_formula(
    head_dim: int, theta: float, s: float, length: int, betas: dict[str, float]
) -> None:
    found, factor = frequencies(head_dim, yarn(s, length, **betas), theta)
    assert found == pytest.approx(written_out_yarn(head_dim, theta, s, length, **betas), rel=1e-13)
    assert factor == pytest.approx(0.1 * math.log(s) + 1, rel=1e-15)


def test_yarn_with_a_ramp_of_no_width_is_a_step() -> None:
    # Trained at 4 tokens no pair turns even once: all but the first are interpolated, none is NaN.
    found, _ = frequencies(8, yarn(4.0, 4))
    assert found == pytest.approx([1.0, 0.1 / 4, 0.01 / 4, 0.001 / 4], rel=1e-14)


def test_yarn_is_that_of_transformers_wherever_the_ramp_ends() -> None:
    """Ends inside the head, beyond either side of it, at one place and the wrong way round."""
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for head_dim, theta, length, fast, slow, truncate in itertools.product(
        (2, 8, 64), (1.5, 3.0, 1e4, 1e6), (1, 4, 64, 4096, 2**20), (2.0, 32.0), (0.5, 1.0), (False, True)
    ):
        values = {"beta_fast": fast, "beta_slow": slow, "truncate": truncate}
        config = transformers.LlamaConfig(
            hidden_size=head_dim,
            num_attention_heads=1,
            max_position_embeddings=4 * length,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": theta,
                "factor": 4.0,
                "original_max_position_embeddings": length,
                **values,
            },
        )
        expected, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, None)
        found, factor = frequencies(head_dim, yarn(4.0, length, **values), theta)
        # Theirs is computed in float32, where a narrow ramp is known less well.
        assert found == pytest.approx(expected.tolist(), rel=3e-5), (head_dim, theta, length, values)
        assert factor == pytest.approx(attention_factor, rel=1e-15)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"factor": 1.5}, 0.1 * math.log(1.5) + 1),
        ({"factor": 0.5}, 1.0),
        ({"attention_factor": 0.8}, 0.8),
        (
            {"mscale": 0.7, "mscale_all_dim": 1.2},
            (0.07 * math.log(4) + 1) / (0.12 * math.log(4) + 1),
        ),
    ],
)
def test_the_factor_of_yarn(changes: dict[str, float], expected: float) -> None:
    values = {"factor": 4.0, **changes}
    assert frequencies(8, yarn(values.pop("factor"), 512, **values))[1] == pytest.approx(expected, rel=1e-15)


def test_dynamic_is_ntk_by_the_length_beyond_the_trained_one() -> None:
    dynamic = DynamicScaling(kind="dynamic", factor=3.0, original_seq_len=100)
    for length, grown in ((7, 1.0), (100, 1.0), (101, 3 * 1.01 - 2), (250, 3 * 2.5 - 2)):
        found, factor = frequencies(64, dynamic, length=length)
        base = 10000.0 * grown ** (64 / 62)
        assert found == pytest.approx([base ** (-2 * i / 64) for i in range(32)], rel=1e-13)
        assert factor == 1.0


def test_longrope_divides_each_pair_by_its_factor_of_the_length() -> None:
    short, long = (1.0, 1.25, 1.5, 2.0), (1.0, 2.0, 5.0, 8.0)
    values = {"kind": "longrope", "original_seq_len": 100, "short_factor": short, "long_factor": long}
    longrope = LongRopeScaling(**values, factor=16.0)  # pyright: ignore[reportArgumentType]
    for length, divisors in ((7, short), (100, short), (101, long)):
        found, factor = frequencies(8, longrope, length=length)
        assert found == pytest.approx([10**-i / divisors[i] for i in range(4)], rel=1e-15)
        assert factor == pytest.approx(math.sqrt(1 + math.log(16) / math.log(100)), rel=1e-15)
    shrunk = LongRopeScaling(**values, factor=0.5)  # pyright: ignore[reportArgumentType]
    assert frequencies(8, shrunk)[1] == 1.0
    given = LongRopeScaling(**values, attention_factor=1.75)  # pyright: ignore[reportArgumentType]
    assert frequencies(8, given)[1] == 1.75


def test_a_rule_goes_by_the_last_position_plus_1_unless_it_is_told_a_length() -> None:
    longrope = LongRopeScaling(
        kind="longrope", original_seq_len=100, short_factor=(1.0,), long_factor=(2.0,), factor=1.0
    )
    rotary = Rotary(RopeConfig(scaling=longrope), 2)
    for last, length, divisor in ((99, None, 1), (100, None, 2), (99, 101.0, 2), (100, 100.0, 1)):
        phases = rotary.phases(torch.tensor([[0, last]]), length)
        assert phases.cos[0, 1, 0].item() == pytest.approx(math.cos(last / divisor), abs=1e-6)


def test_llama3_keeps_fast_pairs_divides_slow_ones_and_ramps_between() -> None:
    # Pairs of base 10**4 turn 1000 / (2 pi), 15.9, 1.59 and 0.159 times within 1000 tokens.
    llama3 = Llama3Scaling(
        kind="llama3", factor=8.0, original_seq_len=1000, low_freq_factor=1.0, high_freq_factor=3.0
    )
    kept = (10 / (2 * math.pi) - 1) / 2
    assert frequencies(8, llama3) == (
        pytest.approx([1.0, 0.1, 0.01 * (kept + (1 - kept) / 8), 0.001 / 8], rel=1e-14),
        1.0,
    )


@pytest.mark.parametrize(
    "scaling", [LinearScaling(kind="linear", factor=1.0), NtkScaling(kind="ntk", factor=1.0), yarn(1.0, 512)]
)
@pytest.mark.parametrize("head_dim", [8, 64])
def test_factor_1_is_the_identity(scaling: RopeScaling, head_dim: int) -> None:
    plain, _ = frequencies(head_dim, NoScaling())
    found, factor = frequencies(head_dim, scaling)
    assert found == pytest.approx(plain, rel=1e-15)
    assert factor == 1.0
