"""The invariants of a step: what any layout leaves alone and every damage to a slice changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from roformer_dist.batch import IGNORE_INDEX, Batch, MaskSpec
from roformer_dist.engine.engine import StepResult
from roformer_dist.engine.invariants import COUNT, StepInvariants, check_targets
from roformer_dist.parallel.comm import Comm
from roformer_dist.parallel.in_process import run_in_process
from roformer_dist.parallel.invariants import InvariantError
from roformer_dist.parallel.layout import choose_layout
from roformer_dist.parallel.mesh import build_mesh


def whole_batch() -> Batch:
    lengths = [9, 1, 13, 23]
    ids = torch.randint(0, 29, (2, 23), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, 23)
    labels = ids.roll(-1, dims=1)
    labels[positions.roll(-1, dims=1) == 0] = IGNORE_INDEX
    counters = torch.arange(46).view(2, 23)
    return Batch(ids, labels, positions, counters, MaskSpec.from_lengths(lengths, causal=True))


def classified_batch() -> Batch:
    """Rows with a class each, pooled by their mean."""
    batch = whole_batch()
    return replace(
        batch,
        labels=torch.full_like(batch.labels, IGNORE_INDEX),
        row_labels=torch.tensor([2, 0]),
        row_ids=torch.tensor([5, 6]),
        pool_weights=torch.full((2, 23), 1 / 23),
    )


def step(mesh: tuple[int, int], damage: str | None = None, batch: Batch | None = None) -> None:
    """One step's check on in-process ranks; rank 1 does the damage."""
    batch = batch or whole_batch()
    ulysses_size, ring_size = mesh

    def rank(world: Comm) -> None:
        grid = build_mesh(world, ulysses_size=ulysses_size, ring_size=ring_size)
        local = choose_layout(ulysses_size, ring_size).slice(batch, world.rank)
        result = StepResult(1.0, 1.0, 1.25)
        if world.rank == 1 and damage == "label":
            local = replace(
                local, labels=torch.where(local.counters == local.counters[0, 0], 0, local.labels)
            )
        if world.rank == 1 and damage == "shift":
            local = replace(local, labels=local.labels.roll(1, dims=1))
        if world.rank == 1 and damage == "positions":
            local = replace(local, position_ids=torch.arange(local.labels.shape[1]).expand_as(local.labels))
        if world.rank == 1 and damage == "input":
            local = replace(local, input_ids=local.input_ids.roll(1, dims=1))
        if world.rank == 1 and damage == "class":
            assert local.row_labels is not None
            local = replace(local, row_labels=local.row_labels + 1)
        if world.rank == 1 and damage == "pool":
            assert local.pool_weights is not None
            local = replace(local, pool_weights=local.pool_weights * 2)
        if world.rank == 1 and damage == "norm":
            result = StepResult(1.0, 1.0, 1.25 * 1.01)
        invariants = StepInvariants(grid)
        invariants.see([batch], [local])
        sums = world.all_sum(torch.tensor(invariants.numbers(result), dtype=torch.float64)).tolist()
        assert len(sums) == COUNT
        invariants.check(sums, result, 7, torch.device("cpu"))

    run_in_process(ulysses_size * ring_size, rank)


@pytest.mark.parametrize("mesh", [(2, 1), (4, 1), (1, 3), (2, 2)], ids=str)
class TestOnAMesh:
    def test_a_sliced_batch_passes(self, mesh: tuple[int, int]) -> None:
        step(mesh)

    @pytest.mark.parametrize(
        ("damage", "line"),
        [
            ("input", "step 7: checksum of input_ids over the ranks 0x"),
            ("label", "step 7: checksum of labels over the ranks 0x"),
            ("shift", "step 7: checksum of labels over the ranks 0x"),
            ("positions", "step 7: checksum of positions over the ranks 0x"),
            ("norm", "step 7: the gradient norm is 1.25 on rank 0 and 1.2625 on rank 1"),
        ],
    )
    def test_damage_is_named_with_both_numbers(self, mesh: tuple[int, int], damage: str, line: str) -> None:
        with pytest.raises(InvariantError, match=line):
            step(mesh, damage)

    def test_classes_and_what_pools_them_are_checked(self, mesh: tuple[int, int]) -> None:
        step(mesh, batch=classified_batch())
        for damage in ("class", "pool"):
            with pytest.raises(InvariantError, match="step 7: checksum of labels over the ranks 0x"):
                step(mesh, damage, classified_batch())


def test_a_missing_target_is_named_with_both_numbers() -> None:
    with pytest.raises(InvariantError, match="step 3: the ranks saw 41 targets, the plan has 42"):
        check_targets(41, 42, 3)
