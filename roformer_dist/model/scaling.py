"""Frequency rules: each turns the rotary frequencies of a config into those of a longer context.

Every rule returns ``(inv_freq, factor)``: float64 ``[head_dim / 2]`` frequencies, and the factor on
cos and sin (so that attention scores are multiplied by its square).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from roformer_dist.config.model import LinearScaling, NoScaling, NtkScaling, RopeConfig, YarnScaling


def base_frequencies(theta: float, head_dim: int) -> Tensor:
    """``theta ** (-2 i / head_dim)`` for i in 0..head_dim/2 (RoFormer, section 3.2.2)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return theta**-exponents


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """The frequencies and the cos/sin factor that ``rope`` asks for."""
    frequencies = base_frequencies(rope.theta, head_dim)
    match rope.scaling:
        case NoScaling():
            return frequencies, 1.0
        case LinearScaling(factor=factor):
            return frequencies / factor, 1.0
        case NtkScaling(factor=factor):
            return ntk_frequencies(rope.theta, head_dim, factor), 1.0
        case YarnScaling() as yarn:
            return yarn_frequencies(frequencies, rope.theta, head_dim, yarn)


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

    low = max(math.floor(pair_with_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(yarn.beta_slow)), head_dim - 1)
    index = torch.arange(head_dim // 2, dtype=torch.float64)
    # 0.001 keeps a ramp of no width a step instead of a division by zero, as in the reference code.
    ramp = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    scaled = frequencies / yarn.factor * ramp + frequencies * (1 - ramp)
    return scaled, 0.1 * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0
