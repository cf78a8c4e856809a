"""What ring, hybrid, chunked and uneven schemes send is their formula to the byte, and chunks shrink buffers."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from roformer_dist.bench.attention import AttentionSettings, formula, run_attention
from roformer_dist.bench.attention_count import Case, Counted, count
from roformer_dist.parallel.cost import Sent

MESHES = [(4, 1, 1), (4, 1, 2), (2, 2, 1), (1, 4, 1), (1, 4, 3), (3, 2, 1)]


def sent(counted: list[Counted]) -> list[Sent]:
    return [Sent(rank.forward_sent, rank.backward_sent) for rank in counted]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: "u{}r{}c{}".format(*m))
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 4), (14, 2), (8, 8)])
@pytest.mark.parametrize(("lengths", "window"), [((96,), None), ((31, 1, 40, 24), None), ((96,), 5)])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
def test_every_rank_sends_what_the_formula_says(
    mesh: tuple[int, int, int],
    heads: int,
    kv_heads: int,
    lengths: tuple[int, ...],
    window: int | None,
    causal: bool,
) -> None:
    case = Case(*mesh, heads, kv_heads, 4, lengths, causal, window)
    assert sent(count(case)) == formula(case)


# T = 96 tokens on 4 ranks, 8 heads, 2 for keys and values, 4 wide, bf16.
BASE = Case(1, 4, 1, 8, 2, 4, (96,))
KEY_BYTES = 2 * 2 * 4 * 2  # K and V of a token


def test_a_ring_both_ways_sends_all_keys_to_the_others_and_gradients_in_float32() -> None:
    keys = 3 * 24 * KEY_BYTES
    assert sent(count(replace(BASE, causal=False))) == [Sent(keys, 3 * keys)] * 4


def test_a_causal_ring_sends_half_a_slice_to_later_ranks() -> None:
    expected = []
    for rank in range(4):
        tokens_sent, tokens_received = 24 * rank + 12 * (3 - rank), 12 * rank + 24 * (3 - rank)
        keys = tokens_sent * KEY_BYTES
        expected.append(Sent(keys, keys + 2 * tokens_received * KEY_BYTES))
    assert sent(count(BASE)) == expected
    assert sum(rank.forward for rank in expected) == 4 * 3 * 24 * KEY_BYTES * 3 // 4


def test_a_window_takes_two_edges_from_the_neighbours_however_long_the_row_is() -> None:
    for tokens in (96, 384):
        busiest = max(sent(count(replace(BASE, lengths=(tokens,), window=5))), key=lambda s: s.forward)
        assert busiest.forward == 2 * 4 * KEY_BYTES


def test_even_ulysses_is_the_published_formula_both_ways() -> None:
    # (2 + 2 M / N) T h (P - 1) / P^2 elements.
    expected = (2 + 2 * 4 / 8) * 96 * (8 * 4) * 3 / 16 * 2
    assert sent(count(Case(4, 1, 1, 8, 4, 4, (96,)))) == [Sent(expected, expected)] * 4


def test_replicated_keys_are_sent_once_to_each_rank_that_uses_them() -> None:
    # One key/value head on 4 ranks of 2 query heads: 3 others get 2 + 2 heads; out of own 2 heads to 3 others.
    unit = 24 * 4 * 2
    assert (
        sent(count(Case(4, 1, 1, 8, 1, 4, (96,))))
        == [Sent((3 * 4 + 3 * 2) * unit, (3 * 2 + 3 * 4) * unit)] * 4
    )


@pytest.mark.parametrize(("ulysses_size", "ring_size"), [(4, 1), (1, 4)])
def test_buffers_shrink_with_the_number_of_chunks(ulysses_size: int, ring_size: int) -> None:
    peaks = []
    for chunks in (1, 2, 4):
        counted = count(Case(ulysses_size, ring_size, chunks, 32, 16, 16, (4096,), dtype=torch.bfloat16))
        peaks.append(
            [max(getattr(rank, f"{way}_peak") for rank in counted) for way in ("forward", "backward")]
        )
    for fewer, more in pairwise(peaks):
        assert more[0] < 0.9 * fewer[0]
        assert more[1] < 0.98 * fewer[1]


def test_the_benchmark_reports_and_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = AttentionSettings(2, 64, 4, 2, 8, (30, 0.5), None, (2, 8), 8192)
    assert run_attention(settings, tmp_path / "a.json") == 0
    written = json.loads((tmp_path / "a.json").read_text())
    assert all(row["equals_formula"] for row in written["schemes"])
    assert {row["ring_size"] for row in written["balance"]} == {2, 8}
    assert "= formula" in capsys.readouterr().out
