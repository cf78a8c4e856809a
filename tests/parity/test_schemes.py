"""Ring, hybrid, uneven heads and chunks of heads on in-process ranks against one process."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from comparison import differences, make_batch, many_ranks, model_config, one_process

from roformer_dist.batch import IGNORE_INDEX, Batch, MaskSpec
from roformer_dist.kernels.reference import ReferenceKernel

# (ulysses_size, ring_size, head_chunks)
MESHES = [
    (1, 2, 1),
    (1, 3, 1),
    (1, 8, 1),
    (2, 2, 1),
    (2, 3, 1),
    (4, 2, 1),
    (3, 1, 1),
    (3, 1, 2),
    (2, 2, 3),
    (1, 2, 2),
]
HEADS: dict[str, dict[str, Any]] = {
    "8/4": {},
    "7/1": {"num_heads": 7, "num_kv_heads": 1, "head_dim": 4},
    "6/2": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 6},
    "14/2": {"num_heads": 14, "num_kv_heads": 2, "head_dim": 4},
}
# Neighbouring halves, several of them, nearly everything.
WINDOWS = [None, 3, 7, 20]


def one_document(batch: Batch) -> Batch:
    """The batch without documents: positions go through, whole rows attend."""
    rows, seq_len = batch.input_ids.shape
    mask = MaskSpec.from_lengths([seq_len] * rows, causal=batch.mask.causal, window=batch.mask.window)
    return replace(batch, position_ids=torch.arange(seq_len).expand(rows, seq_len), mask=mask)


def check(
    mesh: tuple[int, int, int],
    heads: str,
    *,
    causal: bool,
    window: int | None,
    documents: bool,
    dtype: torch.dtype = torch.float32,
) -> None:
    *sizes, chunks = mesh
    model = model_config(**HEADS[heads], num_layers=1, hidden_dropout=0.1)
    batch = make_batch(causal=causal, window=window)
    batch = batch if documents else one_document(batch)
    exact = dtype == torch.float64
    options: dict[str, Any] = {"masked": not causal, "dtype": dtype}
    options |= {"kernel": ReferenceKernel()} if exact else {}
    reference = one_process(model, batch, **options)
    found = many_ranks(tuple(sizes), model, batch, head_chunks=chunks, **options)
    assert differences(found, reference, 1e-12 if exact else 1e-5) == []


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: "u{}r{}c{}".format(*m))
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "masked"])
@pytest.mark.parametrize(("documents", "window"), [(True, None), (False, None), (True, 5), (False, 3)])
def test_a_scheme_computes_what_one_process_computes(
    mesh: tuple[int, int, int], causal: bool, documents: bool, window: int | None
) -> None:
    # The grouping of heads changes from case to case; the full table is the slow test.
    heads = list(HEADS)[(MESHES.index(mesh) + 2 * causal + documents) % len(HEADS)]
    check(mesh, heads, causal=causal, window=window, documents=documents)


@pytest.mark.parametrize("mesh", [(1, 3, 1), (2, 2, 3), (4, 2, 1)], ids=lambda m: "u{}r{}c{}".format(*m))
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, 7)])
def test_in_float64_nothing_is_left_but_rounding(
    mesh: tuple[int, int, int], causal: bool, window: int | None
) -> None:
    check(mesh, "14/2", causal=causal, window=window, documents=True, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [*MESHES, (4, 1, 3), (6, 1, 1), (1, 16, 1), (4, 4, 1)], ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_every_combination(mesh: tuple[int, int, int], heads: str) -> None:
    if mesh[0] * mesh[2] > HEADS[heads].get("num_heads", 8):
        return  # more ranks than heads: refused with the configuration
    for causal, window, documents in product([True, False], WINDOWS, [True, False]):
        check(mesh, heads, causal=causal, window=window, documents=documents)


def test_more_ranks_than_tokens_of_a_document_and_a_rank_without_targets() -> None:
    batch = make_batch(seq_len=9)
    labels = batch.labels.clone()
    labels[:, ::2] = IGNORE_INDEX
    batch = replace(batch, labels=labels)
    model = model_config(num_layers=1)
    reference = one_process(model, batch, masked=False)
    assert differences(many_ranks((1, 8), model, batch, masked=False), reference) == []


def test_bf16_is_as_close_to_float64_as_one_process_is() -> None:
    model, batch = model_config(num_layers=1), make_batch()
    exact = one_process(model, batch, masked=False, kernel=ReferenceKernel(), dtype=torch.float64)[1]

    def error(gradients: dict[str, torch.Tensor]) -> float:
        return float(torch.stack([(gradients[n].double() - g).norm() for n, g in exact.items()]).norm())

    alone = error(one_process(model, batch, masked=False, dtype=torch.bfloat16)[1])
    for mesh in ((1, 4), (2, 2), (3, 1)):
        found = many_ranks(mesh, model, batch, masked=False, dtype=torch.bfloat16)[1]
        assert error(found) <= 2 * alone
