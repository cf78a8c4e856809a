"""The reference: the same rows in one process, no slices, no messages, the mean taken in one place.

Rows that several replicas read are computed once and counted as often.
"""

from __future__ import annotations

import torch

from roformer_dist.engine.schedule import learning_rate
from roformer_dist.kernels.attention import Kernel
from roformer_dist.objectives import SummedLoss
from roformer_dist.parallel.invariants import BITS, labels_checksum
from roformer_dist.parallel.sequence_ops import single_sequence_ops
from roformer_dist.parity.compare import Outcome
from roformer_dist.parity.mesh import TokenTable
from roformer_dist.parity.problem import Problem
from roformer_dist.parity.replica import Weights
from roformer_dist.parity.shrink import STEPS


def one_process(problem: Problem, kernel: Kernel, dtype: torch.dtype, device: torch.device) -> Outcome:
    """Train ``problem`` alone: every parameter's gradient of the summed loss over the step's targets."""
    weights = Weights.of(problem.config, dtype, device, problem.seed)
    network, ops = weights.network, single_sequence_ops(kernel)
    loss = SummedLoss(network, z_loss=problem.config.train.z_loss)
    before = {name: p.detach().clone() for name, p in weights.masters.named_parameters()}
    losses, norms, first = [], [], {}
    table, checksum = TokenTable(problem, network), 0
    table.values["replicas"] += problem.config.parallel.sp_size
    for step in range(STEPS):
        batches, num_valid = problem.step(step)
        gradients = {name: torch.zeros_like(p) for name, p in before.items()}
        total = 0.0
        for number, batch in enumerate(batches):
            copies = problem.copies(number)
            nll_sum, _ = loss(batch.to(device), ops)
            (nll_sum * (copies / num_valid)).backward()
            total += copies * float(nll_sum.detach())
            if not step:
                table.add(batch, copies)
                checksum += copies * labels_checksum([batch])
            for name, parameter in network.named_parameters():
                if parameter.grad is not None:
                    gradients[name] += parameter.grad
                    parameter.grad = None
        if not step:
            first = {name: grad.clone() for name, grad in gradients.items()}
        losses.append(total / num_valid)
        norms.append(weights.update(gradients, learning_rate(problem.config, step)))
    moves = {name: p.detach() - before[name] for name, p in weights.masters.named_parameters()}
    return Outcome(table.values, checksum % 2**BITS, tuple(losses), tuple(norms), first, moves)
