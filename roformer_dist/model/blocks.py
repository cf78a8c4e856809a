"""Norms, MLPs and the block: post-norm as in the paper, pre-norm as today, or its parallel form (GPT-J, GPT-NeoX)."""

from __future__ import annotations

from torch import Tensor, nn

from roformer_dist.config.model import ModelConfig
from roformer_dist.kernels.attention import SequenceOps
from roformer_dist.kernels.mlp import MlpWeights, mlp
from roformer_dist.kernels.norm import RMSNorm
from roformer_dist.model.attention import Attention
from roformer_dist.model.dropout import CounterDropout
from roformer_dist.model.scores import Scores


def make_norm(model: ModelConfig, width: int | None = None) -> nn.Module:
    """The configured normalisation over ``width`` channels; default: hidden_size."""
    norm = RMSNorm if model.norm == "rms_norm" else nn.LayerNorm
    return norm(width or model.hidden_size, eps=model.norm_eps)


class Mlp(nn.Module):
    """Two layers with a GELU between, or SwiGLU (arXiv 2002.05202).

    Attributes:
        tile_tokens: tokens that are computed at a time; None: all (see ``kernels.mlp``).
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.tile_tokens: int | None = None
        self.gate_proj = (
            nn.Linear(model.hidden_size, model.intermediate_size, bias=model.bias)
            if model.mlp == "swiglu"
            else None
        )
        self.up_proj = nn.Linear(model.hidden_size, model.intermediate_size, bias=model.bias)
        self.down_proj = nn.Linear(model.intermediate_size, model.hidden_size, bias=model.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[R, S, hidden_size]`` to the same shape."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        weights = MlpWeights(
            gate=None if gate is None else gate.weight,
            up=up.weight,
            down=down.weight,
            gate_bias=None if gate is None else gate.bias,
            up_bias=up.bias,
            down_bias=down.bias,
        )
        return mlp(x, weights, self.tile_tokens)


class Block(nn.Module):
    """Attention and MLP, each around a residual sum."""

    def __init__(self, model: ModelConfig, *, layer: int, seed: int) -> None:
        super().__init__()
        self.kind = model.block
        self.attention = Attention(model)
        self.attention_norm = make_norm(model)
        self.mlp = Mlp(model)
        self.mlp_norm = make_norm(model)
        # Site 0 is the embedding's.
        self.attention_dropout = CounterDropout(model.hidden_dropout, seed=seed, site=2 * layer + 1)
        self.mlp_dropout = CounterDropout(model.hidden_dropout, seed=seed, site=2 * layer + 2)

    def forward(self, x: Tensor, scores: Scores, counters: Tensor, ops: SequenceOps) -> Tensor:
        """``[R, S, hidden_size]`` to the same shape."""
        if self.kind == "post_norm":
            attended = self.attention(x, scores, ops)
            x = self.attention_norm(x + self.attention_dropout(attended, counters, training=self.training))
            return self.mlp_norm(x + self.mlp_dropout(self.mlp(x), counters, training=self.training))
        attended = self.attention(self.attention_norm(x), scores, ops)
        attended = x + self.attention_dropout(attended, counters, training=self.training)
        mlp_input = x if self.kind == "parallel" else attended
        changed = self.mlp(self.mlp_norm(mlp_input))
        return attended + self.mlp_dropout(changed, counters, training=self.training)
