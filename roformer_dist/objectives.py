"""From a batch to sums: (nll_sum, num_valid). Nobody divides here; the engine does, once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roformer_dist.batch import IGNORE_INDEX, Batch
from roformer_dist.kernels.attention import SequenceOps
from roformer_dist.kernels.loss import summed_cross_entropy, token_cross_entropy
from roformer_dist.model.heads import ClassificationHead, LanguageHead
from roformer_dist.model.roformer import RoFormer


def token_nll(network: RoFormer, batch: Batch, ops: SequenceOps) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of every valid target of this rank's slice; for evaluation, without gradient.

    Causal and masked models differ in their labels and mask, not here; logits exist at valid targets only.

    Returns:
        ``(nll [V] float32, valid [R, S] bool)``, V the number of True in ``valid``, in row order.
    """
    with torch.no_grad():
        head = _language_head(network)
        features, targets, valid = _features_and_targets(network, head, batch, ops)
        return token_cross_entropy(features, head.weight, head.bias, targets), valid


class SummedLoss(nn.Module):
    """The network and its loss as one module, so that ZeRO-3 sees the output layer used inside a forward.

    Args:
        network: with a language or classification head.
        z_loss: weight of a language model's z-loss in the gradient (see ``kernels.loss``).
    """

    def __init__(self, network: RoFormer, *, z_loss: float = 0.0) -> None:
        super().__init__()
        self.network = network
        self.z_loss = z_loss

    def forward(self, batch: Batch, ops: SequenceOps) -> tuple[Tensor, Tensor]:
        """``(nll_sum float32 scalar, num_valid scalar)`` of this rank's slice.

        A row's class is a target of every rank that holds a part of the row: each counts its share.
        """
        if isinstance(self.network.head, ClassificationHead):
            return _row_loss(self.network, batch, ops)
        head = _language_head(self.network)
        features, targets, valid = _features_and_targets(self.network, head, batch, ops)
        nll_sum = summed_cross_entropy(features, head.weight, head.bias, targets, self.z_loss)
        return nll_sum, valid.sum()


def row_logits(network: RoFormer, batch: Batch, ops: SequenceOps) -> Tensor:
    """Logits of every row's classes ``[R, num_labels]``, the same on all ranks of a row.

    Raises:
        ValueError: the batch does not say how its rows are pooled.
    """
    head = network.head
    assert isinstance(head, ClassificationHead)
    if batch.pool_weights is None:
        raise ValueError("a batch to classify needs pool_weights; the head's pool_weights makes them")
    features = network(batch, ops)
    pooled = ops.pool(features, batch.pool_weights.to(features.dtype))
    return head(pooled, batch.row_ids)


def _row_loss(network: RoFormer, batch: Batch, ops: SequenceOps) -> tuple[Tensor, Tensor]:
    if batch.row_labels is None:
        raise ValueError("a batch to learn classes from needs row_labels")
    logits = row_logits(network, batch, ops)
    work = torch.promote_types(logits.dtype, torch.float32)
    nll_sum = F.cross_entropy(logits.to(work), batch.row_labels, ignore_index=IGNORE_INDEX, reduction="sum")
    valid = (batch.row_labels != IGNORE_INDEX).sum()
    return nll_sum * ops.share, valid * ops.share


def _language_head(network: RoFormer) -> LanguageHead:
    assert isinstance(network.head, LanguageHead), "tokens have losses under a language head only"
    return network.head


def _features_and_targets(
    network: RoFormer, head: LanguageHead, batch: Batch, ops: SequenceOps
) -> tuple[Tensor, Tensor, Tensor]:
    features = network(batch, ops)
    valid = batch.labels != IGNORE_INDEX
    return head(features[valid]), batch.labels[valid], valid
