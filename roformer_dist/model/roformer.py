"""The RoFormer: embedding, blocks, head. Plain single-device PyTorch; it knows nothing of ranks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from roformer_dist.batch import Batch
from roformer_dist.config.data import ClassificationObjective, MaskedObjective, Objective
from roformer_dist.config.layers import layer_kind
from roformer_dist.config.model import ModelConfig
from roformer_dist.kernels.attention import SequenceOps
from roformer_dist.model.blocks import Block, make_norm
from roformer_dist.model.dropout import CounterDropout
from roformer_dist.model.heads import ClassificationHead, LanguageHead
from roformer_dist.model.memory import ActivationMemory
from roformer_dist.model.positions import Positions
from roformer_dist.model.rotary import Rotary
from roformer_dist.model.scores import Scores, layer_scores


class RoFormer(nn.Module):
    """A transformer that knows positions by the rotation of queries and keys (arXiv 2104.09864).

    ``config.position`` and ``config.layers`` choose what that paper compares with, and other kinds of layers.

    Attributes:
        rotary: frequencies; assign another to evaluate a scaling rule on the same weights.
        head: the output layer, used by the objective.
        memory: what the blocks keep for their backward; assign another to train longer rows.
    """

    def __init__(
        self, model: ModelConfig, *, masked: bool, seed: int, classes: ClassificationObjective | None = None
    ) -> None:
        """
        Args:
            masked: whether the head is a masked language model's.
            seed: of the dropout.
            classes: what the head tells rows apart by; then there is no vocabulary at the output.
        """
        super().__init__()
        self.config = model
        self.rotary = Rotary(model.rope, model.head_size)
        self.memory = ActivationMemory()
        self.positions = Positions(model)
        self.embedding = nn.Embedding(model.vocab_size, model.embedding_width)
        self.type_embedding = (
            nn.Embedding(model.type_vocab_size, model.embedding_width) if model.type_vocab_size else None
        )
        self.embedding_projection = (
            nn.Linear(model.embedding_width, model.hidden_size, bias=model.bias)
            if model.embedding_width != model.hidden_size
            else nn.Identity()
        )
        self.embedding_dropout = CounterDropout(model.hidden_dropout, seed=seed, site=0)
        self.blocks = nn.ModuleList(Block(model, layer=i, seed=seed) for i in range(model.num_layers))
        # Pre-norm leaves the residual stream unnormalised at the top; post-norm starts normalised instead.
        post_norm = model.block == "post_norm"
        self.final_norm = nn.Identity() if post_norm else make_norm(model)
        self.embedding_norm = make_norm(model, model.embedding_width) if post_norm else nn.Identity()
        self.head = (
            LanguageHead(model, self.embedding, masked=masked)
            if classes is None
            else ClassificationHead(model, classes, seed=seed)
        )

    def forward(self, batch: Batch, ops: SequenceOps, scores: Sequence[Scores] | None = None) -> Tensor:
        """Features ``[R, S, hidden_size]`` of the tokens in ``batch`` (this rank's slice of the sequence).

        Args:
            scores: how each layer attends, where its keys are not those of ``batch`` alone (``model.cache``).
        """
        if scores is None:
            kinds = layer_scores(self.config, self.rotary, self.positions, batch)
            scores = [kinds[layer_kind(self.config, layer)] for layer in range(self.config.num_layers)]
        x = self.embedding(batch.input_ids)
        if self.type_embedding is not None:
            types = batch.token_type_ids
            x = x + self.type_embedding(torch.zeros_like(batch.input_ids) if types is None else types)
        x = self.positions.add_to(x, batch.position_ids)
        x = self.embedding_dropout(self.embedding_norm(x), batch.counters, training=self.training)
        x = self.embedding_projection(x)
        for block, attend in zip(self.blocks, scores, strict=True):
            x = self.memory.run(block, x, ops, attend, batch.counters)
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


def build_model(
    model: ModelConfig, *, masked: bool, seed: int, classes: ClassificationObjective | None = None
) -> RoFormer:
    """A freshly initialised network in float32."""
    network = RoFormer(model, masked=masked, seed=seed, classes=classes)
    initialise(network, seed)
    return network


def build_for(model: ModelConfig, objective: Objective, *, seed: int) -> RoFormer:
    """A freshly initialised network with the head that ``objective`` needs, in float32."""
    masked = isinstance(objective, MaskedObjective)
    classes = objective if isinstance(objective, ClassificationObjective) else None
    return build_model(model, masked=masked, seed=seed, classes=classes)
