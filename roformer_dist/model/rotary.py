"""Rotary position embedding from positions: no table, no buffer, no length limit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from roformer_dist.config.model import RopeConfig
from roformer_dist.kernels.rotation import Pairing, rotate
from roformer_dist.model.scaling import rope_frequencies


@dataclass(frozen=True)
class Phases:
    """cos and sin of every angle of one forward, shared by all layers.

    Attributes:
        cos, sin: float32 ``[R, S, head_dim / 2]``.
        pairing: which dimensions turn together.
    """

    cos: Tensor
    sin: Tensor
    pairing: Pairing

    def rotate(self, x_RSHD: Tensor) -> Tensor:
        """Turn queries or keys ``[R, S, H, head_dim]`` to their positions."""
        return rotate(x_RSHD, self.cos, self.sin, self.pairing)


class Rotary:
    """Frequencies, and the phases they give at any positions.

    Not a module: the frequencies are float64 and must not follow ``.to(bfloat16)`` or be partitioned
    by ZeRO (bf16 angles are the same number at neighbouring positions beyond 256).
    """

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        self.inv_freq, self.factor = rope_frequencies(rope, head_dim)
        self.pairing: Pairing = rope.pairing

    def phases(self, position_ids: Tensor) -> Phases:
        """cos and sin for ``position_ids`` ``[R, S]`` (integers or fractions).

        Angles are products in float64: in float32 they are wrong by 0.06 radian at position 1,000,000.
        """
        angles = position_ids.to(torch.float64)[..., None] * self.inv_freq.to(position_ids.device)
        return Phases(
            cos=(angles.cos() * self.factor).to(torch.float32),
            sin=(angles.sin() * self.factor).to(torch.float32),
            pairing=self.pairing,
        )
