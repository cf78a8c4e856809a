"""Batch and MaskSpec."""

from __future__ import annotations

from dataclasses import replace

import torch

from roformer_dist.batch import IGNORE_INDEX, Batch, MaskSpec


def test_lengths_become_prefix_sums() -> None:
    mask = MaskSpec.from_lengths([3, 1, 4], causal=True, window=2)
    assert mask.cu_seqlens_q.tolist() == mask.cu_seqlens_k.tolist() == [0, 3, 4, 8]
    assert mask.cu_seqlens_q.dtype == torch.int32
    assert (mask.max_q, mask.max_k, mask.causal, mask.window) == (4, 4, True, 2)


def test_no_documents_at_all() -> None:
    mask = MaskSpec.from_lengths([], causal=False)
    assert (mask.documents, mask.max_q) == ((), 0)


def test_documents_are_integers_with_the_difference_of_offsets() -> None:
    plain = MaskSpec.from_lengths([3, 1], causal=True)
    assert plain.documents == ((0, 3, 0, 3, 0), (3, 1, 3, 1, 0))
    shifted = MaskSpec(
        torch.tensor([0, 3, 4], dtype=torch.int32),
        torch.tensor([0, 5, 7], dtype=torch.int32),
        3,
        5,
        True,
        q_offset=torch.tensor([10, 0], dtype=torch.int32),
        k_offset=torch.tensor([8, 2], dtype=torch.int32),
    )
    assert shifted.documents == ((0, 3, 0, 5, 2), (3, 1, 5, 2, -2))
    # One of the two left out counts as 0.
    only_q = MaskSpec(*[shifted.cu_seqlens_q] * 2, 3, 3, True, q_offset=shifted.q_offset)
    assert [document[-1] for document in only_q.documents] == [10, 0]


def test_moving_a_mask_keeps_everything() -> None:
    mask = MaskSpec(
        torch.tensor([0, 2], dtype=torch.int32),
        torch.tensor([0, 3], dtype=torch.int32),
        2,
        3,
        True,
        q_offset=torch.tensor([5], dtype=torch.int32),
        k_offset=torch.tensor([3], dtype=torch.int32),
        window=4,
        min_distance=1,
    )
    # The meta device is the second device that every machine has.
    moved = mask.to("meta")
    moved_tensors = (moved.cu_seqlens_q, moved.cu_seqlens_k, moved.q_offset, moved.k_offset)
    assert {t.device.type for t in moved_tensors if t is not None} == {"meta"}
    assert (moved.max_q, moved.max_k, moved.causal, moved.distances) == (2, 3, True, (1, 3))
    assert mask.to("cpu").documents == mask.documents == ((0, 2, 0, 3, 2),)
    assert replace(mask, k_offset=None).to("meta").k_offset is None


def test_only_labels_say_what_counts() -> None:
    ids = torch.arange(6).reshape(2, 3)
    labels = torch.tensor([[1, IGNORE_INDEX, 0], [IGNORE_INDEX, IGNORE_INDEX, 5]])
    batch = Batch(ids, labels, ids, ids, MaskSpec.from_lengths([3, 3], causal=True))
    assert batch.num_valid == 3
    moved = batch.to("meta")
    tensors = (moved.input_ids, moved.labels, moved.position_ids, moved.counters, moved.mask.cu_seqlens_q)
    assert {t.device.type for t in tensors} == {"meta"}
