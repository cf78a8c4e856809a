"""Frequency rules: each turns the rotary frequencies of a config into those of a longer context.

Every rule returns ``(inv_freq, factor)``: float64 ``[head_dim / 2]`` frequencies, and the factor on
cos and sin (so that attention scores are multiplied by its square).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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


def depends_on_length(scaling: RopeScaling) -> bool:
    """Whether the rule's frequencies are other ones for other lengths of what is read."""
    return isinstance(scaling, DynamicScaling | LongRopeScaling)


def base_frequencies(theta: float, head_dim: int) -> Tensor:
    """``theta ** (-2 i / head_dim)`` for i in 0..head_dim/2 (RoFormer, section 3.2.2)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
    return theta**-exponents


def rope_frequencies(rope: RopeConfig, rotary_dim: int, length: float = 0) -> tuple[Tensor, float]:
    """The frequencies and the cos/sin factor that ``rope`` asks for.

    Args:
        rotary_dim: dimensions of a head that turn.
        length: the longest position of what is read plus 1, for rules that depend on it.
    """
    frequencies = base_frequencies(rope.theta, rotary_dim)
    match rope.scaling:
        case NoScaling():
            return frequencies, 1.0
        case LinearScaling(factor=factor):
            return frequencies / factor, 1.0
        case NtkScaling(factor=factor):
            return ntk_frequencies(rope.theta, rotary_dim, factor), 1.0
        case DynamicScaling(factor=factor, original_seq_len=trained):
            grown = factor * max(length, trained) / trained - (factor - 1)
            return ntk_frequencies(rope.theta, rotary_dim, grown), 1.0
        case YarnScaling() as yarn:
            return yarn_frequencies(frequencies, rope.theta, rotary_dim, yarn)
        case LongRopeScaling() as longrope:
            return longrope_frequencies(frequencies, longrope, length)
        case Llama3Scaling() as llama3:
            return llama3_frequencies(frequencies, llama3), 1.0


def ntk_frequencies(theta: float, head_dim: int, factor: float) -> Tensor:
    """NTK-aware scaling: ``theta' = theta * factor ** (d / (d - 2))``.

    The fastest pair keeps its frequency and the slowest is divided by ``factor`` exactly.
    """
    if head_dim == 2:
        raise ValueError("NTK scaling needs head_dim > 2: with a single pair there is no base to change")
    return base_frequencies(theta * factor ** (head_dim / (head_dim - 2)), head_dim)


def yarn_frequencies(
    frequencies: Tensor, theta: float, head_dim: int, yarn: YarnScaling
) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): keep fast pairs, interpolate slow ones, ramp between; scores * factor**2.

    The ramp runs over pair indices, from the pair that turns ``beta_fast`` times within the trained
    length to the one that turns ``beta_slow`` times, rounded outwards as in the reference code.
    """

    def pair_with_turns(turns: float) -> float:
        return head_dim * math.log(yarn.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with_turns(yarn.beta_fast), pair_with_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    index = torch.arange(head_dim // 2, dtype=torch.float64, device="cpu")
    # As in the reference code and transformers: a ramp of no width is a step, and one whose ends changed places when
    # they were brought into the head (a trained length far from what theta spans) keeps them.
    ramp = ((index - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    scaled = frequencies / yarn.factor * ramp + frequencies * (1 - ramp)
    return scaled, _yarn_attention_factor(yarn)


def _yarn_attention_factor(yarn: YarnScaling) -> float:
    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0

    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale is not None and yarn.mscale_all_dim is not None:
        return temperature(yarn.mscale) / temperature(yarn.mscale_all_dim)
    return temperature(1.0)


def longrope_frequencies(
    frequencies: Tensor, longrope: LongRopeScaling, length: float
) -> tuple[Tensor, float]:
    """LongRoPE (arXiv 2402.13753): each pair divided by a searched factor of its own."""
    divisors = longrope.long_factor if length > longrope.original_seq_len else longrope.short_factor
    scaled = frequencies / torch.tensor(divisors, dtype=torch.float64, device="cpu")
    if longrope.attention_factor is not None:
        return scaled, longrope.attention_factor
    growth = math.log(max(longrope.factor or 1.0, 1.0))
    return scaled, math.sqrt(1 + growth / math.log(longrope.original_seq_len))


def llama3_frequencies(frequencies: Tensor, llama3: Llama3Scaling) -> Tensor:
    """Llama 3.1: by how often a pair turns within the trained length, kept, divided by ``factor``, or between."""
    turns = llama3.original_seq_len * frequencies / (2 * math.pi)
    low, high = llama3.low_freq_factor, llama3.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / llama3.factor + kept * frequencies
