"""The sections that describe the network."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from roformer_dist.config.section import PositiveFloat, PositiveInt, Section


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

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"beta_fast = {self.beta_fast} must be greater than beta_slow = {self.beta_slow}"
            )
        return self


RopeScaling = Annotated[NoScaling | LinearScaling | NtkScaling | YarnScaling, Field(discriminator="kind")]


class RopeConfig(Section):
    """The rotation that encodes position."""

    theta: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 10000.0
    """Base of the frequencies, ``theta ** (-2 i / head_dim)``."""
    pairing: Literal["interleaved", "half"] = "interleaved"
    """Which dimensions turn together: (2i, 2i+1) as in the paper, or (i, i + head_dim/2) as in Llama."""
    scaling: RopeScaling = NoScaling()
    """How the frequencies are changed for longer contexts."""


class ModelConfig(Section):
    """The network."""

    vocab_size: PositiveInt
    """Rows of the embedding; the tokenizer's size."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    num_layers: PositiveInt
    """Number of blocks."""
    num_heads: PositiveInt
    """Query heads."""
    num_kv_heads: PositiveInt | None = None
    """Key and value heads (grouped-query attention); default: num_heads."""
    head_dim: PositiveInt | None = None
    """Width of one head; default: hidden_size / num_heads."""
    intermediate_size: PositiveInt
    """Inner width of the MLP."""
    block: Literal["pre_norm", "post_norm"] = "pre_norm"
    """Norm before each sub-layer (as today) or after the residual sum (as in the paper)."""
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    """Kind of normalisation."""
    norm_eps: PositiveFloat = 1e-6
    """Added to the variance inside a norm."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """Kind of MLP."""
    bias: bool = False
    """Whether linear layers carry a bias."""
    tie_embeddings: bool = True
    """Whether the output layer shares the embedding's weights."""
    hidden_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on each sub-layer's output and the embedding, drawn per token from a counter."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Only 0 is accepted: see the error."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; projections into the residual are divided by sqrt(2 layers)."""
    rope: RopeConfig = RopeConfig()
    """Rotary position embedding."""

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} is not divisible by num_heads = {self.num_heads}; "
                f"set head_dim or change one of them"
            )
        if self.head_size % 2:
            raise ValueError(f"head_dim = {self.head_size} is odd; a rotation needs pairs of dimensions")
        if self.head_size == 2 and self.rope.scaling.kind == "ntk":
            raise ValueError(
                "rope.scaling: ntk needs head_dim > 2; with a single pair there is no base to change"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} is not divisible by num_kv_heads = {self.kv_heads}"
            )
        if self.attention_dropout:
            raise ValueError(
                f"attention_dropout = {self.attention_dropout} cannot be honoured: flash kernels draw it from "
                "their own generator, so it would differ between meshes; set it to 0 and use hidden_dropout"
            )
        return self
