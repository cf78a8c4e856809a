"""Rotary position embedding from positions: no table, no buffer, no length limit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from roformer_dist.config.rope import RopeConfig
from roformer_dist.kernels.rotation import Pairing, rotate
from roformer_dist.model.scaling import depends_on_length, rope_frequencies


@dataclass(frozen=True)
class Phases:
    """cos and sin of every angle of one forward, shared by all layers.

    Attributes:
        cos, sin: float32 ``[R, S, rotary_dim / 2]``.
        pairing: which dimensions turn together.
    """

    cos: Tensor
    sin: Tensor
    pairing: Pairing

    def rotate(self, x_RSHD: Tensor) -> Tensor:
        """Turn queries or keys ``[R, S, H, head_dim]`` to their positions; dimensions past rotary_dim stay."""
        return rotate(x_RSHD, self.cos, self.sin, self.pairing)


class Rotary:
    """Frequencies, and the phases they give at any positions.

    Not a module: the frequencies are float64 and must not follow ``.to(bfloat16)`` or be partitioned
    by ZeRO (bf16 angles are the same number at neighbouring positions beyond 256).
    """

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        self.rope = rope
        self.rotary_dim = rope.rotary_dim(head_dim)
        self.pairing: Pairing = rope.pairing
        self.depends_on_length = depends_on_length(rope.scaling)
        self.inv_freq, self.factor = rope_frequencies(rope, self.rotary_dim)

    def frequencies(self, length: float | None) -> tuple[Tensor, float]:
        """``inv_freq`` and the factor on cos and sin; ``length`` counts where the rule depends on it."""
        if not self.depends_on_length or length is None:
            return self.inv_freq, self.factor
        return rope_frequencies(self.rope, self.rotary_dim, length)

    def phases(self, position_ids: Tensor, length: float | None = None) -> Phases:
        """cos and sin for ``position_ids`` ``[R, S]`` (integers or fractions).

        Angles are products in float64: in float32 they are wrong by 0.06 radian at position 1,000,000.

        Args:
            length: the longest position plus 1 that a length-dependent rule goes by, where ``position_ids``
                are a slice of what is read; default: theirs.
        """
        if self.depends_on_length and length is None:
            length = float(position_ids.max()) + 1
        inv_freq, factor = self.frequencies(length)
        angles = position_ids.to(torch.float64)[..., None] * inv_freq.to(position_ids.device)
        return Phases(
            cos=(angles.cos() * factor).to(torch.float32),
            sin=(angles.sin() * factor).to(torch.float32),
            pairing=self.pairing,
        )
