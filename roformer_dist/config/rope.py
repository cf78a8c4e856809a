"""The sections that describe the rotation, and how its frequencies are changed for longer contexts."""

from __future__ import annotations

import math
import sys
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from roformer_dist.config.layers import PlainPolicy, ScorePolicy
from roformer_dist.config.section import PositiveFloat, PositiveInt, Section

Factors = Annotated[tuple[PositiveFloat, ...], Field(min_length=1, strict=False)]


class NoScaling(Section):
    """RoPE with the frequencies it was trained with."""

    kind: Literal["none"] = "none"


class LinearScaling(Section):
    """Position interpolation (PI): every frequency divided by ``factor``."""

    kind: Literal["linear"]
    factor: PositiveFloat
    """Target length over trained length."""


class NtkScaling(Section):
    """NTK-aware scaling: the base grows so that the slowest frequency is divided by ``factor``."""

    kind: Literal["ntk"]
    factor: PositiveFloat
    """Target length over trained length."""


class DynamicScaling(Section):
    """Dynamic NTK: the base grows with the longest position of a micro-batch, once it is past the trained length.

    The rotation of a row then depends on the rows beside it: meant for evaluation and for imported models.
    """

    kind: Literal["dynamic"]
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    """At length L the base's factor is that of ntk with ``factor * L / original_seq_len - (factor - 1)``."""
    original_seq_len: PositiveInt
    """The length the frequencies were trained at."""


class YarnScaling(Section):
    """YaRN: interpolation by wavelength, and a temperature on the attention scores."""

    kind: Literal["yarn"]
    factor: PositiveFloat
    """Target length over trained length."""
    original_seq_len: PositiveInt
    """The length the frequencies were trained at."""
    beta_fast: PositiveFloat = 32.0
    """Pairs that turn more often than this within the trained length are left alone."""
    beta_slow: PositiveFloat = 1.0
    """Pairs that turn less often than this are interpolated in full."""
    attention_factor: PositiveFloat | None = None
    """Factor on cos and sin; default: 0.1 ln(factor) + 1, or the quotient of the two mscales."""
    mscale: PositiveFloat | None = None
    """With mscale_all_dim: cos and sin times (0.1 mscale ln(factor) + 1) over the same with mscale_all_dim."""
    mscale_all_dim: PositiveFloat | None = None
    """See mscale."""
    truncate: bool = True
    """Whether the ramp's ends are rounded outwards to whole pairs."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"beta_fast = {self.beta_fast} must be greater than beta_slow = {self.beta_slow}"
            )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError("mscale and mscale_all_dim count only together; give both or neither")
        if self.mscale is not None and self.attention_factor is not None:
            raise ValueError(
                f"attention_factor = {self.attention_factor} would override mscale = {self.mscale}; "
                "give one of them"
            )
        return self


class LongRopeScaling(Section):
    """LongRoPE: a factor for each pair; the long ones where a micro-batch has a position past the trained length.

    The rotation of a row then depends on the rows beside it, unless all are on one side of that length.
    """

    kind: Literal["longrope"]
    original_seq_len: Annotated[int, Field(gt=1)]
    """The length the frequencies were trained at."""
    short_factor: Factors
    """One divisor for each rotary pair, up to original_seq_len."""
    long_factor: Factors
    """One divisor for each rotary pair, beyond it."""
    factor: PositiveFloat | None = None
    """Target length over trained length; cos and sin are multiplied by sqrt(1 + ln factor / ln original_seq_len)."""
    attention_factor: PositiveFloat | None = None
    """Factor on cos and sin instead of the one that follows from factor."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.short_factor) != len(self.long_factor):
            raise ValueError(
                f"short_factor has {len(self.short_factor)} numbers and long_factor {len(self.long_factor)}; "
                "each has one for every rotary pair"
            )
        if (self.factor is None) == (self.attention_factor is None):
            raise ValueError("give one of factor and attention_factor: it says how scores are scaled")
        return self


class Llama3Scaling(Section):
    """Llama 3.1's rule: long wavelengths divided by ``factor``, short ones kept, a ramp between."""

    kind: Literal["llama3"]
    factor: PositiveFloat
    """Target length over trained length."""
    original_seq_len: PositiveInt
    """The length the frequencies were trained at."""
    low_freq_factor: PositiveFloat = 1.0
    """Wavelengths above original_seq_len / low_freq_factor are interpolated in full."""
    high_freq_factor: PositiveFloat = 4.0
    """Wavelengths below original_seq_len / high_freq_factor are left alone."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor = {self.high_freq_factor} must be greater than "
                f"low_freq_factor = {self.low_freq_factor}"
            )
        return self


RopeScaling = Annotated[
    NoScaling | LinearScaling | NtkScaling | DynamicScaling | YarnScaling | LongRopeScaling | Llama3Scaling,
    Field(discriminator="kind"),
]


class RopeConfig(Section):
    """The rotation that encodes position."""

    theta: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 10000.0
    """Base of the frequencies, ``theta ** (-2 i / head_dim)``."""
    pairing: Literal["interleaved", "half"] = "interleaved"
    """Which dimensions turn together: (2i, 2i+1) as in the paper, or (i, i + head_dim/2) as in Llama."""
    partial: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each head's dimensions that turn, the first ones; the others carry no position (GPT-NeoX)."""
    rotary_value: bool = False
    """Whether values turn too, as one RoFormer checkpoint family does; outputs then depend on absolute positions."""
    scaling: RopeScaling = NoScaling()
    """How the frequencies are changed for longer contexts."""
    policy: ScorePolicy = PlainPolicy()
    """How far keys are rotated, where that differs from near ones."""

    def rotary_dim(self, head_dim: int) -> int:
        """Dimensions of a head that turn."""
        return int(head_dim * self.partial)

    def check(self, head_dim: int) -> None:
        """ValueError unless heads of ``head_dim`` can be turned this way."""
        rotary_dim = self.rotary_dim(head_dim)
        if head_dim % 2:
            raise ValueError(f"head_dim = {head_dim} is odd; a rotation needs pairs of dimensions")
        if rotary_dim % 2 or not rotary_dim:
            raise ValueError(
                f"rope.partial = {self.partial} of head_dim = {head_dim} is {rotary_dim} dimensions; "
                "a rotation needs pairs of them"
            )
        if rotary_dim == 2 and self.scaling.kind in ("ntk", "dynamic"):
            raise ValueError(
                f"rope.scaling: {self.scaling.kind} needs head_dim > 2; with a single pair there is "
                "no base to change"
            )
        if isinstance(self.scaling, NtkScaling | DynamicScaling):
            # theta * factor ** (d / (d - 2)) must be a number; dynamic factors grow with the length.
            exponent = rotary_dim / (rotary_dim - 2)
            largest = math.exp((math.log(sys.float_info.max) - math.log(self.theta)) / exponent)
            largest /= 2**32 if self.scaling.kind == "dynamic" else 1
            if self.scaling.factor >= largest:
                raise ValueError(
                    f"rope.scaling.factor = {self.scaling.factor} makes a base beyond any number with theta = "
                    f"{self.theta} and {rotary_dim} rotary dimensions; it must be below {largest:.3g}"
                )
        if isinstance(self.scaling, LongRopeScaling) and len(self.scaling.long_factor) != rotary_dim // 2:
            raise ValueError(
                f"rope.scaling.long_factor has {len(self.scaling.long_factor)} numbers; "
                f"{rotary_dim} rotary dimensions are {rotary_dim // 2} pairs"
            )
