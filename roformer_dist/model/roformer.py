"""The RoFormer: embedding, blocks, head. Plain single-device PyTorch; it knows nothing of ranks."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from roformer_dist.batch import Batch
from roformer_dist.config.model import ModelConfig
from roformer_dist.kernels.attention import SequenceOps
from roformer_dist.model.blocks import Block, make_norm
from roformer_dist.model.dropout import CounterDropout
from roformer_dist.model.heads import LanguageHead
from roformer_dist.model.rotary import Rotary


class RoFormer(nn.Module):
    """A transformer whose only notion of position is the rotation of queries and keys (arXiv 2104.09864).

    Attributes:
        rotary: frequencies; assign another to evaluate a scaling rule on the same weights.
        head: the output layer, used by the objective.
    """

    def __init__(self, model: ModelConfig, *, masked: bool, seed: int) -> None:
        super().__init__()
        self.config = model
        self.rotary = Rotary(model.rope, model.head_size)
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.embedding_dropout = CounterDropout(model.hidden_dropout, seed=seed, site=0)
        self.blocks = nn.ModuleList(Block(model, layer=i, seed=seed) for i in range(model.num_layers))
        # Pre-norm leaves the residual stream unnormalised at the top; post-norm starts normalised instead.
        self.final_norm = make_norm(model) if model.block == "pre_norm" else nn.Identity()
        self.embedding_norm = make_norm(model) if model.block == "post_norm" else nn.Identity()
        self.head = LanguageHead(model, self.embedding, masked=masked)

    def forward(self, batch: Batch, ops: SequenceOps) -> Tensor:
        """Features ``[R, S, hidden_size]`` of the tokens in ``batch`` (this rank's slice of the sequence)."""
        phases = self.rotary.phases(batch.position_ids)
        x = self.embedding_norm(self.embedding(batch.input_ids))
        x = self.embedding_dropout(x, batch.counters, training=self.training)
        for block in self.blocks:
            x = block(x, phases, batch.mask, batch.counters, ops)
        return self.final_norm(x)


def initialise(network: RoFormer, seed: int) -> None:
    """Draw every parameter anew: normal weights, zero biases, unit norms; residual projections smaller.

    Each parameter has a generator of its own, seeded by its name, so that the draw does not depend on
    the order of construction or on who holds which parameter.
    """
    model = network.config
    residual_std = model.init_std / math.sqrt(2 * model.num_layers)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else model.init_std
                parameter.normal_(0.0, std, generator=generator)


def build_model(model: ModelConfig, *, masked: bool, seed: int) -> RoFormer:
    """A freshly initialised network in float32."""
    network = RoFormer(model, masked=masked, seed=seed)
    initialise(network, seed)
    return network
