"""From a batch to sums: (nll_sum, num_valid). Nobody divides here; the engine does, once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from roformer_dist.batch import IGNORE_INDEX, Batch
from roformer_dist.kernels.attention import SequenceOps
from roformer_dist.kernels.loss import cross_entropy
from roformer_dist.model.roformer import RoFormer


def token_nll(network: RoFormer, batch: Batch, ops: SequenceOps) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of every valid target of this rank's slice.

    Causal and masked models differ in their labels and mask, not here; logits exist at valid targets only.

    Returns:
        ``(nll [V] float32, valid [R, S] bool)``, V the number of True in ``valid``, in row order.
    """
    features = network(batch, ops)
    valid = batch.labels != IGNORE_INDEX
    head = network.head
    return cross_entropy(head(features[valid]), head.weight, head.bias, batch.labels[valid]), valid


class SummedLoss(nn.Module):
    """The network and its loss as one module, so that ZeRO-3 sees the output layer used inside a forward."""

    def __init__(self, network: RoFormer) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch, ops: SequenceOps) -> tuple[Tensor, Tensor]:
        """``(nll_sum float32 scalar, num_valid int64 scalar)`` of this rank's slice."""
        nll, valid = token_nll(self.network, batch, ops)
        return nll.sum(), valid.sum()


def perplexity(nll_sum: float, num_valid: int) -> float:
    """``exp`` of the mean negative log-likelihood; infinite where that overflows."""
    return float(torch.tensor(nll_sum / num_valid, dtype=torch.float64).exp())
