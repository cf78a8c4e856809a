"""Self-attention of one block. Shapes: R rows, S tokens, N heads, M key/value heads, D head_dim."""

from __future__ import annotations

from torch import Tensor, nn

from roformer_dist.config.model import ModelConfig
from roformer_dist.kernels.attention import SequenceOps
from roformer_dist.kernels.norm import RMSNorm
from roformer_dist.model.scores import Scores


class Attention(nn.Module):
    """Projections around the attention it is given; values are not rotated (RoFormer, eq. 16), unless asked for."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.head_dim = model.head_size
        queries, keys = model.num_heads * model.head_size, model.kv_heads * model.head_size
        qkv_bias, out_bias = model.biased_projections != "none", model.biased_projections == "all"
        self.q_proj = nn.Linear(model.hidden_size, queries, bias=qkv_bias)
        self.k_proj = nn.Linear(model.hidden_size, keys, bias=qkv_bias)
        self.v_proj = nn.Linear(model.hidden_size, keys, bias=qkv_bias)
        self.o_proj = nn.Linear(queries, model.hidden_size, bias=out_bias)
        self.q_norm = RMSNorm(model.head_size, eps=model.norm_eps) if model.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(model.head_size, eps=model.norm_eps) if model.qk_norm else nn.Identity()

    def forward(self, x_RSC: Tensor, scores: Scores, ops: SequenceOps) -> Tensor:
        """``[R, S, hidden_size]`` to the same shape."""
        q_RSND = self.q_norm(self.q_proj(x_RSC).unflatten(2, (-1, self.head_dim)))
        k_RSMD = self.k_norm(self.k_proj(x_RSC).unflatten(2, (-1, self.head_dim)))
        v_RSMD = self.v_proj(x_RSC).unflatten(2, (-1, self.head_dim))
        return self.o_proj(scores(q_RSND, k_RSMD, v_RSMD, ops).flatten(2))
