"""Generation from a cache that ranks keep together, against one process: features, logits and tokens."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from roformer_dist.batch import visible_distances
from roformer_dist.config.model import ModelConfig
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.model.cache import KVCache, Piece
from roformer_dist.model.generation import Generated, generate
from roformer_dist.model.roformer import RoFormer, build_model
from roformer_dist.model.sampling import Sampling
from roformer_dist.parallel.comm import Comm
from roformer_dist.parallel.in_process import run_in_process
from roformer_dist.parallel.sequence_ops import single_sequence_ops
from roformer_dist.parallel.shared_cache import SharedCache, part_of, visible_keys

OPS = single_sequence_ops(SdpaKernel())
BASE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "intermediate_size": 40,
    "init_std": 0.3,
}
DYNAMIC = {"kind": "dynamic", "factor": 2.0, "original_seq_len": 13}
MODELS: dict[str, dict[str, Any]] = {
    "one-kv-head": {"num_kv_heads": 1},
    "sliding-linear": {"layers": ["sliding", "linear", "full"], "sliding_window": 5, "num_kv_heads": 2},
    "window-of-one": {"layers": ["full", "sliding"], "sliding_window": 1},
    "rerope": {"rope": {"policy": {"kind": "rerope", "window": 6}}, "num_kv_heads": 2},
    "self-extend": {"rope": {"policy": {"kind": "self_extend", "window": 5, "group": 3}}},
    "dynamic": {"rope": {"scaling": DYNAMIC}, "layers": ["full", "sliding"], "sliding_window": 4},
    "yarn": {"rope": {"scaling": {"kind": "yarn", "factor": 2.0, "original_seq_len": 8}}},
    "t5": {"position": {"kind": "relative_bias", "num_buckets": 8, "max_distance": 12}},
    "alibi-sliding": {"position": {"kind": "alibi"}, "layers": ["sliding", "full"], "sliding_window": 5},
    "no-position": {"layers": ["full", "no_position"]},
}


def build(name: str, dtype: torch.dtype = torch.float32) -> RoFormer:
    return build_model(ModelConfig(**BASE | MODELS[name]), masked=False, seed=3).to(dtype).eval()


def tokens(length: int, seed: int = 0) -> list[int]:
    return torch.randint(48, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def read_in_chunks(network: RoFormer, cache: KVCache) -> Tensor:
    """Features of two texts in chunks of uneven lengths, one alone at times, single steps at last."""
    texts = [tokens(29, 4), tokens(18, 5)]
    found = []
    for counts in ((9, 1), (2, 0), (1, 3), (7, 6), (1, 1), (1, 1), (0, 1), (8, 2), (0, 3)):
        parts = [(i, n, cache.lengths[i]) for i, n in enumerate(counts) if n]
        pieces = [Piece(i, torch.tensor(texts[i][at : at + n]), extent=29) for i, n, at in parts]
        found.append(cache.read(OPS, pieces))
    return torch.cat(found)


@pytest.mark.parametrize(
    ("name", "size"),
    [pytest.param(n, p, marks=() if p == 3 else pytest.mark.slow) for n in MODELS for p in (2, 3, 4)],
)
def test_features_of_every_read_are_those_of_one_process(name: str, size: int):
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        expected = read_in_chunks(network := build(name, dtype), KVCache(network, [29, 18]))

        def rank(comm: Comm, dtype: torch.dtype = dtype) -> tuple[Tensor, int]:
            network = build(name, dtype)
            cache = KVCache(network, [29, 18], SharedCache(SdpaKernel(), comm))
            return read_in_chunks(network, cache), max(len(x) for x in cache._positions)

        found = run_in_process(size, rank)
        for features, kept in found:
            assert float((features - expected).abs().max()) <= bound
            assert kept <= -(-29 // size)  # no rank keeps more than its share


def test_bf16_is_as_close_to_float64_as_one_process_is():
    network = build("one-kv-head", torch.bfloat16)
    for block in network.blocks:  # large scores: an lse in bf16 would be off by as much as a weight is
        block.attention.q_proj.weight.data.mul_(8)
    exact = copy.deepcopy(network).double()
    expected = read_in_chunks(exact, KVCache(exact, [29, 18]))

    def rank(comm: Comm) -> Tensor:
        return read_in_chunks(network, KVCache(network, [29, 18], SharedCache(SdpaKernel(), comm)))

    alone = read_in_chunks(network, KVCache(network, [29, 18]))
    shared, own = (float((x.double() - expected).norm()) for x in (run_in_process(3, rank)[0], alone))
    assert shared <= 1.1 * own


def continued(comm: Comm | None, name: str, sampling: Sampling) -> list[Generated]:
    ranks = SharedCache(SdpaKernel(), comm) if comm else None
    prompts = [tokens(9, 1), tokens(1, 2), tokens(22, 3)]
    new = {"max_new_tokens": 8, "sampling": sampling, "stop_ids": [7]}
    return [
        result
        for chunk in (None, 6)
        for result in generate(build(name), OPS, prompts, prefill_chunk=chunk, ranks=ranks, **new)
    ]


GREEDY, DRAWN = Sampling(), Sampling(1.0, top_p=0.9, seed=5)
DRAWING = ("one-kv-head", "sliding-linear", "dynamic")


@pytest.mark.parametrize(
    ("name", "sampling"), [*((n, GREEDY) for n in MODELS), *((n, DRAWN) for n in DRAWING)]
)
def test_tokens_are_those_of_one_process(name: str, sampling: Sampling):
    alone = continued(None, name, sampling)
    assert len({token for result in alone for token in result.tokens}) > 3
    assert run_in_process(4, lambda comm: continued(comm, name, sampling)) == [alone] * 4


def test_ranks_with_other_parameters_are_told_apart():
    def rank(comm: Comm) -> None:
        network = build("one-kv-head")
        with torch.no_grad():
            network.head.weight.mul_(-1.0 if comm.rank == 1 else 1.0)
        ranks = SharedCache(SdpaKernel(), comm)
        with pytest.raises(RuntimeError, match="rank 1 chose the tokens"):
            generate(network, OPS, [tokens(9)], max_new_tokens=2, ranks=ranks)

    run_in_process(2, rank)


@given(start=st.integers(0, 200), count=st.integers(1, 200), size=st.integers(1, 17))
def test_parts_tile_a_read_and_ranks_never_differ_by_more_than_one(start: int, count: int, size: int):
    read = range(start, start + count)
    parts = [part_of(read, rank, size) for rank in range(size)]
    assert [token for part in parts for token in part] == list(read)
    held = [len(part_of(range(start), r, size)) + len(parts[r]) for r in range(size)]
    assert max(held) - min(held) <= 1


@settings(max_examples=300)
@given(data=st.data())
def test_visible_keys_are_exactly_those_within_the_distances(data: st.DataObject):
    start, count = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 12))
    last = start + count - 1
    positions = np.array(sorted(data.draw(st.sets(st.integers(0, last)))), dtype=np.int64)
    window = data.draw(st.none() | st.integers(1, 30))
    nearest = data.draw(st.none() | st.integers(1, 30))
    distances = visible_distances(causal=True, window=window, min_distance=nearest)
    found = np.zeros((count, len(positions)), dtype=int)
    distance = np.arange(start, start + count)[:, None] - positions
    low, high = distances
    wanted = (distance >= (low or 0)) & (distance <= (10**9 if high is None else high))
    for seen in visible_keys(range(start, start + count), positions, distances):
        keys = positions[seen.keys]
        assert len(keys)
        if seen.first is None:
            found[:, seen.keys] += 1
        else:
            assert (keys == seen.first + np.arange(len(keys))).all()
            found[:, seen.keys] += wanted[:, seen.keys]
    assert (found == wanted).all()
