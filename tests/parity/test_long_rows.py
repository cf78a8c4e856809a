"""What only long rows come to: strips of several tokens, several chunks of states, windows shorter than a piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import VOCAB, differences, many_ranks, model_config, one_process

from roformer_dist.batch import IGNORE_INDEX, Batch, MaskSpec
from roformer_dist.kernels.linear import CHUNK
from roformer_dist.parallel.layout import ZigzagLayout, row_lengths
from roformer_dist.parallel.zigzag import strip_length


def batch_of(documents: list[list[int]], *, causal: bool) -> Batch:
    """Rows of documents, each row with targets of its own kind."""
    rows, seq_len = len(documents), sum(documents[0])
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCAB, (rows, seq_len), generator=generator)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])
    if causal:
        labels = ids.roll(-1, dims=1)
        labels[positions.roll(-1, dims=1) == 0] = IGNORE_INDEX
    else:
        labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, ids, IGNORE_INDEX)
    counters = torch.arange(ids.numel()).view_as(ids) + 7000
    mask = MaskSpec.from_lengths([n for row in documents for n in row], causal=causal)
    return Batch(ids, labels, positions, counters, mask)


# Documents over every rank, of some ranks, shorter than a strip and of one token; no length that ranks divide.
MIXED = [[700, 3, 1, 411, 2, 258, 5, 1, 90, 330]]
CASES: dict[str, tuple[tuple[int, int], list[list[int]], bool, dict[str, Any]]] = {
    "ring, strips of 4": ((1, 3), MIXED, True, {}),
    "ring, masked, sliding": (
        (1, 4),
        [[900, 1, 2, 350, 261, 87]],
        False,
        {"layers": ("sliding", "full"), "sliding_window": 60},
    ),
    "hybrid, linear": ((2, 2), [[1290, 1, 130, 4, 258, 318]], True, {"layers": ("linear", "full")}),
    "ring, linear, masked": ((1, 2), [[500, 3, 129, 387]], False, {"layers": ("linear",)}),
}


@pytest.mark.parametrize("name", CASES)
def test_long_rows_train_what_one_process_trains(name: str) -> None:
    mesh, documents, causal, model = CASES[name]
    config = model_config(**{"num_layers": 2, "num_heads": 4, "num_kv_heads": 2} | model)
    batch = batch_of(documents, causal=causal)
    found = many_ranks(mesh, config, batch, masked=not causal)
    assert differences(found, one_process(config, batch, masked=not causal)) == []


def test_these_rows_are_long_enough() -> None:
    for name, (mesh, documents, causal, _) in CASES.items():
        local = -(-sum(documents[0]) // (mesh[0] * mesh[1]))
        # Twice: the layer's own chunks and the strips of its ring.
        assert local > 2 * CHUNK if "linear" in name else True
        assert strip_length(local * mesh[0]) > 1, name
        layout = ZigzagLayout(mesh[1], mesh[0])
        mask = layout.slice(batch_of(documents, causal=causal), 0).mask
        holdings = layout.holdings(mask, 1)
        lengths = row_lengths(mask, 1)[0]
        holders = [sum(number in h.document for h in holdings) for number in range(len(lengths))]
        assert {1, mesh[1]} <= set(holders), (name, holders)
