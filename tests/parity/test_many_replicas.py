"""More replicas cost one process no more, and a mesh that mixes them up is still found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from roformer_dist.config import Config, load_config
from roformer_dist.kernels.reference import ReferenceKernel
from roformer_dist.parallel.in_process import ThreadComm
from roformer_dist.parity import check, reference, replica
from roformer_dist.parity.check import Report, check_in_process
from roformer_dist.parity.command import verdict, with_mesh
from roformer_dist.parity.problem import OWN_ROWS, make_problem
from roformer_dist.parity.reference import one_process
from roformer_dist.parity.shrink import ACCUMULATION, STEPS

RECIPES = Path(__file__).parent.parent.parent / "configs"
Patch = pytest.MonkeyPatch
DP_SIZE = 6


def config(name: str = "quickstart", sp: int = 2) -> Config:
    return with_mesh(load_config(RECIPES / f"{name}.toml"), sp=sp, ring=1, zero=None)


def failed(report: Report) -> set[str]:
    return {row["compared"] for row in report.rows() if row["failed"]}


@pytest.mark.parametrize("dp_size", [4, 64, 512])
def test_one_process_has_as_many_rows_for_any_number_of_replicas(dp_size: int, monkeypatch: Patch) -> None:
    rows = []

    class Counting(reference.SummedLoss):
        def forward(self, batch: Any, ops: Any) -> Any:
            rows.append(len(batch.input_ids))
            return super().forward(batch, ops)

    monkeypatch.setattr(reference, "SummedLoss", Counting)
    problem = make_problem(config(), dp_size=dp_size)
    outcome = one_process(problem, ReferenceKernel(), torch.float32, torch.device("cpu"))
    assert outcome.tokens["holders"].min() > 0  # none is taken for what pads a row
    assert sum(rows) == STEPS * OWN_ROWS * 2 * problem.config.train.micro_batch_size
    assert sum(problem.copies(n) for n in range(len(problem.step(0)[0]))) == 2 * dp_size


@pytest.mark.parametrize("dp_size", [1, 3, 4, 5, 9])
def test_the_replicas_of_a_mesh_read_what_one_process_counts(dp_size: int) -> None:
    problem = make_problem(config(), dp_size=dp_size)
    for step in range(STEPS):
        everything, targets = problem.step(step)
        seen = [0] * len(everything)
        for dp_rank in range(dp_size):
            mine, same = problem.step(step, dp_rank)
            assert same == targets
            for batch in mine:
                seen[[torch.equal(batch.counters, other.counters) for other in everything].index(True)] += 1
        assert seen == [problem.copies(number) for number in range(len(everything))]
        assert targets == sum(n * batch.num_valid for n, batch in zip(seen, everything))


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
@pytest.mark.parametrize("dp_size", [1, 2, 3, 8])
def test_every_replica_has_a_row_of_one_document_in_a_micro_batch_of_two(
    dp_size: int, micro_batch_size: int
) -> None:
    base = config()
    train = base.train.model_copy(update={"micro_batch_size": micro_batch_size})
    problem = make_problem(base.model_copy(update={"train": train}), dp_size=dp_size)
    size = problem.config.train.micro_batch_size
    for step in range(STEPS):
        for dp_rank in range(dp_size):
            batches, _ = problem.step(step, dp_rank)
            assert len(batches) == ACCUMULATION == 2
            for row in range(size):
                ends = [set(batch.mask.cu_seqlens_q.tolist()) for batch in batches]
                seq_len = problem.config.train.seq_len
                whole = [not found & set(range(row * seq_len + 1, (row + 1) * seq_len)) for found in ends]
                assert any(whole), (step, dp_rank, row)


def test_replicas_that_share_rows_train_what_one_process_trains() -> None:
    report = check_in_process(config(), ["fp32"], DP_SIZE)
    assert report.passed, verdict(report)
    assert "24 a step, 16 of them different" in report.facts["model"]


def other_replica(patch: Patch, number: Callable[[int], int]) -> None:
    original = check.build_mesh

    def build(*arguments: Any, **sizes: int) -> Any:
        mesh = original(*arguments, **sizes)
        return replace(mesh, dp_rank=number(mesh.dp_rank))

    patch.setattr(check, "build_mesh", build)


def same_rows_everywhere(patch: Patch) -> None:
    other_replica(patch, lambda dp_rank: 0)


def a_shared_row_read_twice(patch: Patch) -> None:
    """Replicas 4 and 5, whose rows are the same, are both the fifth."""
    other_replica(patch, lambda dp_rank: min(dp_rank, 4))


def neighbours_read_alike(patch: Patch) -> None:
    other_replica(patch, lambda dp_rank: dp_rank // 2)


def average_over_some(ranks: list[int], patch: Patch) -> None:
    """Gradients are averaged over ``ranks`` alone, by the right factor for them."""

    class Some:
        def __init__(self, world: ThreadComm) -> None:
            self.world = world

        def all_sum(self, tensor: Tensor) -> Tensor:
            return self.world.all_gather(tensor)[ranks].sum(0) * (self.world.size / len(ranks))

    original = replica.PlainReplica.__init__

    def planted(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        self._world = Some(self._world)

    patch.setattr(replica.PlainReplica, "__init__", planted)


def average_over_half(patch: Patch) -> None:
    average_over_some(list(range(DP_SIZE)), patch)


def average_over_every_other(patch: Patch) -> None:
    average_over_some([rank for rank in range(2 * DP_SIZE) if rank // 2 % 2 == 0], patch)


@pytest.mark.parametrize(
    ("plant", "shown"),
    [
        (same_rows_everywhere, {"replicas", "holders", "labels' checksum", "loss", "gradients"}),
        (a_shared_row_read_twice, {"replicas"}),
        (neighbours_read_alike, {"replicas", "holders", "loss", "gradients"}),
        (average_over_half, {"gradients", "gradient norm"}),
        (average_over_every_other, {"gradients", "gradient norm"}),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_replicas_that_are_mixed_up_are_found(
    plant: Callable[[Patch], None], shown: set[str], monkeypatch: Patch
) -> None:
    plant(monkeypatch)
    report = check_in_process(config(), ["fp32"], DP_SIZE)
    assert shown <= failed(report)
