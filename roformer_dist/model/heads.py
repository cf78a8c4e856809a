"""What stands between the trunk and the vocabulary."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from roformer_dist.config.model import ModelConfig
from roformer_dist.model.blocks import make_norm


class LanguageHead(nn.Module):
    """The output layer of a causal or masked language model; logits are computed by the loss.

    The masked model transforms its features first and has an output bias, as BERT and RoFormer do.

    Attributes:
        weight: ``[vocab_size, hidden_size]``, the embedding's own when tied.
        bias: ``[vocab_size]`` or None.
    """

    def __init__(self, model: ModelConfig, embedding: nn.Embedding, *, masked: bool) -> None:
        super().__init__()
        self.transform = nn.Linear(model.hidden_size, model.hidden_size) if masked else None
        self.transform_norm = make_norm(model) if masked else None
        self.projection = nn.Linear(model.hidden_size, model.vocab_size, bias=masked)
        if model.tie_embeddings:
            self.projection.weight = embedding.weight

    @property
    def weight(self) -> Tensor:
        """``[vocab_size, hidden_size]``."""
        return self.projection.weight

    @property
    def bias(self) -> Tensor | None:
        """``[vocab_size]``, or None for a causal model."""
        return self.projection.bias

    def forward(self, features: Tensor) -> Tensor:
        """``[..., hidden_size]`` features, as the output layer wants them."""
        if self.transform is None or self.transform_norm is None:
            return features
        return self.transform_norm(F.gelu(self.transform(features)))
