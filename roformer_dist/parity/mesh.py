"""A few steps on a mesh, whatever its ranks are: what each saw and computed, put together."""

from __future__ import annotations

import torch

from roformer_dist.batch import Batch
from roformer_dist.engine.schedule import learning_rate
from roformer_dist.model.roformer import RoFormer
from roformer_dist.parallel.comm import Comm
from roformer_dist.parallel.invariants import BITS, labels_checksum
from roformer_dist.parallel.layout import Layout
from roformer_dist.parallel.mesh import Mesh
from roformer_dist.parity.compare import Outcome
from roformer_dist.parity.problem import Problem
from roformer_dist.parity.replica import Replica
from roformer_dist.parity.shrink import STEPS


class TokenTable:
    """What the ranks were given for each token of the first step, in the order of counters.

    Attributes:
        values: float64; the number of ranks that hold a token; its input, label, position and RoPE phases,
            times that number; and how many ranks are in each replica.
    """

    def __init__(self, problem: Problem, network: RoFormer) -> None:
        self._seq_len = problem.config.train.seq_len
        self._rotary = network.rotary if problem.config.model.position.kind == "rotary" else None
        tokens = problem.rows_per_step * self._seq_len
        width = network.rotary.rotary_dim if self._rotary else 0
        shapes = {
            "replicas": (problem.dp_size,),
            "holders": (tokens,),
            "inputs": (tokens,),
            "labels": (tokens,),
            "positions": (tokens,),
            "phases": (tokens, width),
        }
        self.values = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def add(self, batch: Batch, copies: int = 1) -> None:
        """A micro-batch as the model is given it, on ``copies`` replicas."""
        # Rows start at slot 1; what pads a row between ranks has counter 0.
        real = batch.counters >= self._seq_len
        places = batch.counters[real] - self._seq_len
        found = {
            "holders": torch.ones_like(places),
            "inputs": batch.input_ids[real],
            "labels": batch.labels[real],
            "positions": batch.position_ids[real],
        }
        if self._rotary:
            phases = self._rotary.phases(batch.position_ids, batch.extent)
            found["phases"] = torch.cat([phases.cos, phases.sin], dim=-1)[real]
        for name, values in found.items():
            self.values[name].index_add_(0, places, values.double(), alpha=copies)

    def sum_over(self, world: Comm, device: torch.device) -> None:
        """Make it that of all ranks."""
        self.values = {name: world.all_sum(value.to(device)).cpu() for name, value in self.values.items()}


def on_mesh(problem: Problem, mesh: Mesh, layout: Layout, replica: Replica, device: torch.device) -> Outcome:
    """Train ``problem`` on the ranks of ``mesh``; all of them take part and get the same outcome."""
    world, config = mesh.world, problem.config
    before = replica.parameters()
    losses, norms, first = [], [], {}
    table, checksum = TokenTable(problem, replica.network), 0

    def total(value: float) -> float:
        return float(world.all_sum(torch.tensor(value, dtype=torch.float64, device=device)))

    for step in range(STEPS):
        batches, num_valid = problem.step(step, mesh.dp_rank)
        local = [layout.slice(batch, mesh.sp.rank) for batch in batches]
        nll_sum = replica.forward_backward([batch.to(device) for batch in local], num_valid)
        if not step:
            first = replica.gradients()
            for batch in local:
                table.add(batch)
            table.values["replicas"][mesh.dp_rank] += 1
            table.sum_over(world, device)
            checksum = int(total(labels_checksum(local))) % 2**BITS
        losses.append(total(nll_sum) / num_valid)
        norms.append(replica.update(learning_rate(config, step)))
    moves = {name: value - before[name] for name, value in replica.parameters().items()}
    return Outcome(table.values, checksum, tuple(losses), tuple(norms), first, moves)
