"""From a batch to sums: (nll_sum, num_valid). Nobody divides here; the engine does, once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from roformer_dist.batch import IGNORE_INDEX, Batch
from roformer_dist.kernels.attention import SequenceOps
from roformer_dist.kernels.loss import summed_cross_entropy, token_cross_entropy
from roformer_dist.model.roformer import RoFormer


def token_nll(network: RoFormer, batch: Batch, ops: SequenceOps) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of every valid target of this rank's slice; for evaluation, without gradient.

    Causal and masked models differ in their labels and mask, not here; logits exist at valid targets only.

    Returns:
        ``(nll [V] float32, valid [R, S] bool)``, V the number of True in ``valid``, in row order.
    """
    with torch.no_grad():
        features, targets, valid = _features_and_targets(network, batch, ops)
        return token_cross_entropy(features, network.head.weight, network.head.bias, targets), valid


class SummedLoss(nn.Module):
    """The network and its loss as one module, so that ZeRO-3 sees the output layer used inside a forward."""

    def __init__(self, network: RoFormer) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch, ops: SequenceOps) -> tuple[Tensor, Tensor]:
        """``(nll_sum float32 scalar, num_valid int64 scalar)`` of this rank's slice."""
        features, targets, valid = _features_and_targets(self.network, batch, ops)
        head = self.network.head
        return summed_cross_entropy(features, head.weight, head.bias, targets), valid.sum()


def _features_and_targets(network: RoFormer, batch: Batch, ops: SequenceOps) -> tuple[Tensor, Tensor, Tensor]:
    features = network(batch, ops)
    valid = batch.labels != IGNORE_INDEX
    return network.head(features[valid]), batch.labels[valid], valid
