"""Rotary self-attention of one block. Shapes: R rows, S tokens, N heads, M key/value heads, D head_dim."""

from __future__ import annotations

from torch import Tensor, nn

from roformer_dist.batch import MaskSpec
from roformer_dist.config.model import ModelConfig
from roformer_dist.kernels.attention import SequenceOps
from roformer_dist.model.rotary import Phases


class Attention(nn.Module):
    """Projections around the attention it is given; values are not rotated (RoFormer, eq. 16)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.head_dim = model.head_size
        self.q_proj = nn.Linear(model.hidden_size, model.num_heads * model.head_size, bias=model.bias)
        self.k_proj = nn.Linear(model.hidden_size, model.kv_heads * model.head_size, bias=model.bias)
        self.v_proj = nn.Linear(model.hidden_size, model.kv_heads * model.head_size, bias=model.bias)
        self.o_proj = nn.Linear(model.num_heads * model.head_size, model.hidden_size, bias=model.bias)

    def forward(self, x_RSC: Tensor, phases: Phases, mask: MaskSpec, ops: SequenceOps) -> Tensor:
        """``[R, S, hidden_size]`` to the same shape."""
        q_RSND = self.q_proj(x_RSC).unflatten(2, (-1, self.head_dim))
        k_RSMD = self.k_proj(x_RSC).unflatten(2, (-1, self.head_dim))
        v_RSMD = self.v_proj(x_RSC).unflatten(2, (-1, self.head_dim))
        out_RSND = ops.attend(phases.rotate(q_RSND), phases.rotate(k_RSMD), v_RSMD, mask, self.head_dim**-0.5)
        return self.o_proj(out_RSND.flatten(2))
