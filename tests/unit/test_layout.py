"""Slices of a batch: together the batch, labels and documents intact, padding invisible."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from roformer_dist.batch import IGNORE_INDEX, Batch, MaskSpec
from roformer_dist.parallel.layout import ContiguousLayout, PlanKey

FIELDS = ("input_ids", "labels", "position_ids", "counters", "token_type_ids", "pool_weights")


def batch_of(rows: list[list[int]], *, causal: bool = True, window: int | None = None) -> Batch:
    """Rows of documents with the given lengths; every number in it is different from its neighbours'."""
    seq_len = sum(rows[0])
    ids = torch.arange(len(rows) * seq_len).reshape(len(rows), seq_len) + 100
    labels, positions = ids + 1, torch.zeros_like(ids)
    for r, lengths in enumerate(rows):
        ends = torch.tensor(lengths).cumsum(0)
        labels[r, ends - 1] = IGNORE_INDEX
        positions[r] = torch.cat([torch.arange(n) for n in lengths])
    flat = [n for lengths in rows for n in lengths]
    mask = MaskSpec.from_lengths(flat, causal=causal, window=window)
    return Batch(
        ids, labels, positions, ids + 10_000, mask, token_type_ids=ids % 7, pool_weights=(ids / 1000).float()
    )


ROWS = [[5, 1, 7], [13]]


def joined(batch: Batch, sp_size: int, field: str) -> Tensor:
    layout = ContiguousLayout(sp_size)
    return torch.cat([getattr(layout.slice(batch, rank), field) for rank in range(sp_size)], dim=1)


@pytest.mark.parametrize("sp_size", [1, 2, 3, 4, 5, 13])
def test_slices_in_the_order_of_ranks_are_the_batch(sp_size: int) -> None:
    batch = batch_of(ROWS)
    for field in FIELDS:
        whole = joined(batch, sp_size, field)
        assert torch.equal(whole[:, :13], getattr(batch, field)), field
        assert whole.shape[1] - 13 < sp_size


@pytest.mark.parametrize("sp_size", [1, 2, 4, 5])
def test_every_rank_holds_the_same_number_of_tokens_and_the_targets_add_up(sp_size: int) -> None:
    batch, layout = batch_of(ROWS), ContiguousLayout(sp_size)
    slices = [layout.slice(batch, rank) for rank in range(sp_size)]
    assert {part.input_ids.shape for part in slices} == {(2, layout.local_seq_len(13))}
    assert sum(part.num_valid for part in slices) == batch.num_valid == 22


def test_a_token_at_the_edge_of_a_slice_keeps_its_target() -> None:
    batch = batch_of([[12]])
    first = ContiguousLayout(2).slice(batch, 0)
    assert first.labels[0, -1] == batch.input_ids[0, 6]


def test_positions_and_counters_go_on_across_slices() -> None:
    second = ContiguousLayout(2).slice(batch_of([[12]]), 1)
    assert second.position_ids[0].tolist() == [6, 7, 8, 9, 10, 11]
    assert second.counters[0, 0] == 10_106


def test_padding_is_a_document_of_its_own_after_each_row() -> None:
    part = ContiguousLayout(4).slice(batch_of(ROWS, causal=False, window=6), 3)
    assert torch.diff(part.mask.cu_seqlens_q).tolist() == [5, 1, 7, 3, 13, 3]
    assert torch.equal(part.mask.cu_seqlens_q, part.mask.cu_seqlens_k)
    assert (part.mask.causal, part.mask.window, part.mask.max_q) == (False, 6, 13)
    assert part.labels[:, 1:].eq(IGNORE_INDEX).all()


def test_a_slice_knows_how_far_the_whole_batch_reaches() -> None:
    batch = batch_of(ROWS)
    assert {ContiguousLayout(4).slice(batch, rank).extent for rank in range(4)} == {13.0}
    assert ContiguousLayout(4).slice(replace(batch, extent=40.0), 1).extent == 40.0


def test_a_plan_is_for_all_that_a_mask_says() -> None:
    mask = MaskSpec.from_lengths([5, 7], causal=True)
    changes = ({}, {"causal": False}, {"window": 3}, {"window": 4}, {"min_distance": 2})
    keys = [PlanKey(replace(mask, **change), 1) for change in changes]  # pyright: ignore
    keys += [PlanKey(mask, 2), PlanKey(MaskSpec.from_lengths([7, 5], causal=True), 1)]
    assert len(set(keys)) == len(keys)
    assert PlanKey(MaskSpec.from_lengths([5, 7], causal=True), 1) == keys[0]


def test_without_padding_the_mask_is_the_batch_s_own() -> None:
    batch = batch_of([[4, 8]])
    assert ContiguousLayout(3).slice(batch, 2).mask is batch.mask


def test_indices_are_the_places_that_slice_takes() -> None:
    batch, layout = batch_of([[12]]), ContiguousLayout(4)
    for rank in range(4):
        places = layout.indices(batch.mask, 1, rank)
        assert torch.equal(layout.slice(batch, rank).input_ids, batch.input_ids.gather(1, places))


def test_a_document_across_the_end_of_a_row_is_refused() -> None:
    good = batch_of(ROWS)
    crossing = MaskSpec.from_lengths([5, 10, 11], causal=True)
    batch = Batch(good.input_ids, good.labels, good.position_ids, good.counters, crossing)
    with pytest.raises(ValueError, match="crosses the end of a row of 13 tokens"):
        ContiguousLayout(2).slice(batch, 0)
