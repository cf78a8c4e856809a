"""One rank's network and optimizer in plain PyTorch: what the reference trains, and ranks inside one process."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from roformer_dist.batch import Batch
from roformer_dist.config import Config, derive
from roformer_dist.engine.engine import loss_scale
from roformer_dist.engine.optimizer import build_optimizer
from roformer_dist.kernels.attention import SequenceOps
from roformer_dist.model.options import apply_options
from roformer_dist.model.roformer import RoFormer, build_for
from roformer_dist.objectives import SummedLoss
from roformer_dist.parallel.comm import Comm


class Replica(Protocol):
    """A rank that trains; its methods are called on all ranks together."""

    network: RoFormer

    def forward_backward(self, micro_batches: Sequence[Batch], num_valid: int) -> float:
        """Accumulate the step's gradient; this rank's part of the summed loss."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """The whole step's gradient, by parameter, before clipping."""
        ...

    def update(self, lr: float) -> float:
        """Clip and step; the gradient's norm before clipping."""
        ...

    def parameters(self) -> dict[str, Tensor]:
        """The weights that the optimizer keeps, by parameter."""
        ...


@dataclass(frozen=True)
class Weights:
    """A network that computes in ``dtype`` beside the weights that are updated (float32, or float64 with it)."""

    network: RoFormer
    masters: RoFormer
    optimizer: torch.optim.Optimizer
    max_grad_norm: float

    @classmethod
    def of(cls, config: Config, dtype: torch.dtype, device: torch.device, seed: int) -> Weights:
        """Freshly initialised; the same on every rank for a seed."""
        masters = build_for(config.model, config.objective, seed=seed).to(
            device, torch.promote_types(dtype, torch.float32)
        )
        network = copy.deepcopy(masters).to(dtype)
        optimizer = build_optimizer(masters, config.optimizer)
        return cls(network, masters, optimizer, config.optimizer.max_grad_norm)

    def update(self, gradients: dict[str, Tensor], lr: float) -> float:
        """One step of the optimizer with these gradients; their norm before clipping."""
        for name, parameter in self.masters.named_parameters():
            parameter.grad = gradients[name].to(parameter.dtype).clone()
        norm = float(nn.utils.clip_grad_norm_(self.masters.parameters(), self.max_grad_norm))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            for mine, master in zip(self.network.parameters(), self.masters.parameters(), strict=True):
                mine.copy_(master)
        return norm


class PlainReplica:
    """A rank without DeepSpeed: gradients are averaged over all ranks and micro-batches, as DeepSpeed does."""

    def __init__(
        self,
        config: Config,
        ops: SequenceOps,
        world: Comm,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> None:
        self._weights = Weights.of(config, dtype, device, seed)
        self.network = self._weights.network
        self._shape, self._ops, self._world = derive(config, world.size), ops, world
        apply_options(self.network, config.train, device)
        self._loss = SummedLoss(self.network, z_loss=config.train.z_loss)
        self._gradients: dict[str, Tensor] = {}

    def forward_backward(self, micro_batches: Sequence[Batch], num_valid: int) -> float:
        """See Replica."""
        shape, nll_total = self._shape, 0.0
        sums = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for name, p in self.network.named_parameters()
        }
        for batch in micro_batches:
            nll_sum, _ = self._loss(batch, self._ops)
            (nll_sum * loss_scale(shape, num_valid)).backward()
            nll_total += float(nll_sum.detach())
            for name, parameter in self.network.named_parameters():
                if parameter.grad is not None:
                    sums[name] += parameter.grad
                    parameter.grad = None
        count = shape.world_size * shape.gradient_accumulation_steps
        whole = self._world.all_sum(torch.cat([grad.flatten() for grad in sums.values()])) / count
        parts = whole.split([grad.numel() for grad in sums.values()])
        self._gradients = {name: part.view_as(sums[name]) for name, part in zip(sums, parts)}
        return nll_total

    def gradients(self) -> dict[str, Tensor]:
        """See Replica."""
        return {name: grad.clone() for name, grad in self._gradients.items()}

    def update(self, lr: float) -> float:
        """See Replica."""
        return self._weights.update(self._gradients, lr)

    def parameters(self) -> dict[str, Tensor]:
        """See Replica."""
        return {name: p.detach().clone() for name, p in self._weights.masters.named_parameters()}
