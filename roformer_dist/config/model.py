"""The sections that describe the network."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from roformer_dist.config.layers import LayerPattern, Position, RotaryPosition, check_layers
from roformer_dist.config.rope import RopeConfig
from roformer_dist.config.section import PositiveFloat, PositiveInt, Section


class ModelConfig(Section):
    """The network."""

    vocab_size: PositiveInt
    """Rows of the embedding; the tokenizer's size."""
    type_vocab_size: Annotated[int, Field(ge=0)] = 0
    """Rows of the token-type embedding, added to the tokens' (BERT's segments); 0: there is none."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    embedding_size: PositiveInt | None = None
    """Width of the embedding, projected to hidden_size where they differ; default: hidden_size."""
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
    block: Literal["pre_norm", "post_norm", "parallel"] = "pre_norm"
    """Norm before each sub-layer (as today), after the residual sum (as in the paper), or before both in parallel."""
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    """Kind of normalisation."""
    norm_eps: PositiveFloat = 1e-6
    """Added to the variance inside a norm."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """Kind of MLP."""
    bias: bool = False
    """Whether linear layers carry a bias."""
    attention_bias: Literal["none", "qkv", "all"] | None = None
    """Which of attention's projections carry one; default: all or none of them, as bias says."""
    qk_norm: bool = False
    """RMS norm on each query and key head before the rotation (Qwen3)."""
    tie_embeddings: bool = True
    """Whether the output layer shares the embedding's weights."""
    head_transform: bool | None = None
    """Dense layer, GELU and norm before the output layer, and a bias in it (BERT); default: in masked models."""
    hidden_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on each sub-layer's output and the embedding, drawn per token from a counter."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Only 0 is accepted: see the error."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; projections into the residual are divided by sqrt(2 layers)."""
    layers: LayerPattern = ("full",)
    """Kinds of layers, a pattern repeated up to num_layers; no_position attends fully without rotation or bias."""
    sliding_window: PositiveInt | None = None
    """Tokens that a sliding layer sees, the query's own included (to either side in masked models)."""
    linear_features: Literal["elu", "softmax"] = "elu"
    """Feature map of linear layers: elu + 1 of both, or the softmax of queries and the exponential of keys."""
    position: Position = RotaryPosition()
    """How tokens know where they are."""
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

    @property
    def embedding_width(self) -> int:
        """Width of the embedding."""
        return self.embedding_size or self.hidden_size

    def transforms_head(self, *, masked: bool) -> bool:
        """Whether a transform stands before the output layer."""
        return masked if self.head_transform is None else self.head_transform

    @property
    def biased_projections(self) -> Literal["none", "qkv", "all"]:
        """Which of attention's projections carry a bias."""
        return self.attention_bias or ("all" if self.bias else "none")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} is not divisible by num_heads = {self.num_heads}; "
                f"set head_dim or change one of them"
            )
        self.rope.check(self.head_size)
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} is not divisible by num_kv_heads = {self.kv_heads}"
            )
        check_layers(self)
        if self.attention_dropout:
            raise ValueError(
                f"attention_dropout = {self.attention_dropout} cannot be honoured: flash kernels draw it from "
                "their own generator, so it would differ between meshes; set it to 0 and use hidden_dropout"
            )
        return self
