"""AdamW and its parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from roformer_dist.config.training import OptimizerConfig


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices decay; norms, biases and embeddings do not.

    An embedding is a lookup of vectors, not a map, and a tied one is counted here once.
    """
    embeddings = {
        id(parameter)
        for module in network.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    decayed, kept = [], []
    for parameter in network.parameters():
        matrix = parameter.ndim > 1 and id(parameter) not in embeddings
        (decayed if matrix else kept).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]


def build_optimizer(
    network: nn.Module, optimizer: OptimizerConfig, *, fused: bool = False
) -> torch.optim.AdamW:
    """AdamW over ``parameter_groups``; the schedule sets the learning rate before every step.

    Args:
        fused: one pass over each tensor and no temporary ones, which on the CPU is not torch's default.
    """
    return torch.optim.AdamW(
        parameter_groups(network, optimizer.weight_decay),
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        fused=fused or None,
    )
