"""Classification of rows that several in-process ranks share, against one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from comparison import SEQ_LEN, Outcome, differences, make_batch, model_config
from torch import Tensor

from roformer_dist.batch import IGNORE_INDEX, Batch
from roformer_dist.config.data import ClassificationObjective
from roformer_dist.kernels.attention import SequenceOps
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.model.heads import ClassificationHead
from roformer_dist.model.roformer import build_for
from roformer_dist.objectives import SummedLoss, row_logits
from roformer_dist.parallel.attention import ParallelSequenceOps
from roformer_dist.parallel.comm import Comm
from roformer_dist.parallel.in_process import run_in_process
from roformer_dist.parallel.mesh import build_mesh
from roformer_dist.parallel.sequence_ops import sequence_ops, single_sequence_ops

CLASSES = [2, IGNORE_INDEX, 0]


class KeepsItsGradient(ParallelSequenceOps):
    """Sums what is pooled, but gives back the gradient of this rank's share of the loss alone."""

    def pool(self, x: Tensor, weights: Tensor) -> Tensor:
        part = torch.einsum("rsc,rs->rc", x, weights)
        return part + (self.comm.all_sum(part) - part).detach()


def step(batch: Batch, ops: SequenceOps, pooling: str) -> tuple[Tensor, Outcome]:
    objective = ClassificationObjective.model_validate(
        {"kind": "classification", "num_labels": 3, "pooling": pooling}
    )
    network = build_for(model_config(hidden_dropout=0.1), objective, seed=11)
    nll_sum, num_valid = SummedLoss(network)(batch, ops)
    (nll_sum / 2).backward()
    assert num_valid.item() == pytest.approx(2 * ops.share)
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return row_logits(network.eval(), batch, ops).detach(), (nll_sum.item() / 2, gradients)


def rows(pooling: str) -> Batch:
    batch = make_batch(causal=False)
    objective: Any = {"kind": "classification", "num_labels": 3, "pooling": pooling}
    head = ClassificationHead(model_config(), ClassificationObjective.model_validate(objective), seed=0)
    return replace(
        batch,
        labels=torch.full_like(batch.labels, IGNORE_INDEX),
        row_labels=torch.tensor(CLASSES),
        row_ids=torch.arange(3) + 70,
        pool_weights=head.pool_weights(torch.tensor([SEQ_LEN, 9, 1]), SEQ_LEN),
    )


def shared(mesh: tuple[int, int], batch: Batch, pooling: str, faulty: bool = False) -> list[Any]:
    def rank(comm: Comm) -> tuple[Tensor, Outcome]:
        ops, layout = sequence_ops(SdpaKernel(), build_mesh(comm, ulysses_size=mesh[0], ring_size=mesh[1]))
        if faulty:
            ops = KeepsItsGradient(ops.kernel, ops.scheme, ops.comm)
        return step(layout.slice(batch, comm.rank), ops, pooling)

    return run_in_process(mesh[0] * mesh[1], rank)


def total(outcomes: list[Outcome]) -> Outcome:
    names = outcomes[0][1]
    gradients = {n: torch.stack([g[n] for _, g in outcomes]).sum(0) for n in names}
    return sum(loss for loss, _ in outcomes), gradients


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("mesh", [(2, 1), (1, 3), (2, 2)], ids=lambda m: "u{}r{}".format(*m))
def test_shared_rows_have_the_classes_and_gradients_of_one_process(
    mesh: tuple[int, int], pooling: str
) -> None:
    batch = rows(pooling)
    logits, reference = step(batch, single_sequence_ops(SdpaKernel()), pooling)
    found = shared(mesh, batch, pooling)
    assert differences(total([outcome for _, outcome in found]), reference) == []
    for theirs, _ in found:
        torch.testing.assert_close(theirs, logits)
        assert torch.equal(theirs, found[0][0])


def test_a_gradient_that_stays_on_its_rank_is_found() -> None:
    batch = rows("mean")
    _, reference = step(batch, single_sequence_ops(SdpaKernel()), "mean")
    wrong = differences(total([o for _, o in shared((2, 1), batch, "mean", faulty=True)]), reference)
    assert "blocks.0.attention.q_proj.weight" in wrong
    assert "loss" not in wrong
