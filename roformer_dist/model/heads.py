"""What stands between the trunk and the vocabulary, or the classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roformer_dist.config.data import ClassificationObjective
from roformer_dist.config.model import ModelConfig
from roformer_dist.model.blocks import make_norm
from roformer_dist.model.dropout import CounterDropout


class LanguageHead(nn.Module):
    """The output layer of a causal or masked language model; logits are computed by the loss.

    The masked model transforms its features first and has an output bias, as BERT and RoFormer do.

    Attributes:
        weight: ``[vocab_size, width]``, the embedding's own when tied.
        bias: ``[vocab_size]`` or None.
        masked: whether the targets are masked tokens of the input, not the next ones.
    """

    def __init__(self, model: ModelConfig, embedding: nn.Embedding, *, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        transformed = model.transforms_head(masked=masked)
        # The transform ends where the embedding begins, so that the two can be tied.
        width = model.embedding_width if transformed else model.hidden_size
        self.transform = nn.Linear(model.hidden_size, width) if transformed else None
        self.transform_norm = make_norm(model, width) if transformed else None
        self.projection = nn.Linear(width, model.vocab_size, bias=transformed)
        if model.tie_embeddings:
            self.projection.weight = embedding.weight

    @property
    def weight(self) -> Tensor:
        """``[vocab_size, width]``."""
        return self.projection.weight

    @property
    def bias(self) -> Tensor | None:
        """``[vocab_size]``, or None without a transform."""
        return self.projection.bias

    def forward(self, features: Tensor) -> Tensor:
        """``[..., hidden_size]`` features as the output layer wants them, ``[..., width]``."""
        if self.transform is None or self.transform_norm is None:
            return features
        return self.transform_norm(F.gelu(self.transform(features)))


def pool_weights(pooling: str, lengths: Tensor, seq_len: int) -> Tensor:
    """What a batch needs to pool rows of ``lengths`` ``[R]`` tokens, padded to ``seq_len``: float32 ``[R, S]``."""
    places = torch.arange(seq_len)
    if pooling == "first":
        return (places == 0).float().expand(len(lengths), seq_len)
    return (places < lengths[:, None]) / lengths[:, None].float()


class ClassificationHead(nn.Module):
    """Classes of pooled rows: dropout, dense layer, GELU, dropout, output layer, as in Hugging Face's RoFormer."""

    def __init__(self, model: ModelConfig, classes: ClassificationObjective, *, seed: int) -> None:
        super().__init__()
        self.pooling = classes.pooling
        self.dense = nn.Linear(model.hidden_size, model.hidden_size)
        self.projection = nn.Linear(model.hidden_size, classes.num_labels)
        # The sites after those of the blocks.
        first = 2 * model.num_layers + 1
        self.dropouts = [CounterDropout(model.hidden_dropout, seed=seed, site=first + i) for i in range(2)]

    def forward(self, pooled: Tensor, row_ids: Tensor | None) -> Tensor:
        """``[R, hidden_size]`` to logits ``[R, num_labels]``; dropout draws by ``row_ids`` int64 ``[R]``.

        Raises:
            ValueError: dropout without row_ids to draw by.
        """
        hidden = F.gelu(self.dense(self._drop(0, pooled, row_ids)))
        return self.projection(self._drop(1, hidden, row_ids))

    def pool_weights(self, lengths: Tensor, seq_len: int) -> Tensor:
        """See ``pool_weights``."""
        return pool_weights(self.pooling, lengths, seq_len)

    def _drop(self, site: int, x: Tensor, row_ids: Tensor | None) -> Tensor:
        dropout = self.dropouts[site]
        if not self.training or not dropout.probability:
            return x
        if row_ids is None:
            raise ValueError("dropout of a row's features needs the batch's row_ids")
        return dropout(x, row_ids, training=True)
