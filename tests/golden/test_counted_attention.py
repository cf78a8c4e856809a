"""What every scheme and form of attention sends is its formula to the byte, and chunks shrink buffers."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from roformer_dist.batch import MaskSpec
from roformer_dist.bench.attention import AttentionSettings, formula, run_attention
from roformer_dist.bench.attention_count import Case, Counted, NoKernel, count
from roformer_dist.kernels.attention import ScorePart
from roformer_dist.model.positions import alibi_bias
from roformer_dist.parallel.comm import Comm
from roformer_dist.parallel.cost import Sent
from roformer_dist.parallel.counting import CountingComm
from roformer_dist.parallel.in_process import run_in_process
from roformer_dist.parallel.mesh import build_mesh
from roformer_dist.parallel.sequence_ops import sequence_ops

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


@pytest.mark.parametrize("form", ["biased", "parts"])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 4), (14, 2), (8, 8), (8, 1)])
def test_other_forms_send_what_the_formula_says(form: str, chunks: int, heads: int, kv_heads: int) -> None:
    if chunks > 1 and heads < 12:
        chunks = 2
    case = Case(4, 1, chunks, heads, kv_heads, 4, (31, 1, 40, 24), form=form)
    assert sent(count(case)) == formula(case)


def test_a_bias_sends_the_positions_and_two_parts_a_query_and_a_key_more() -> None:
    plain = Case(4, 1, 1, 8, 4, 4, (96,))
    query, key = 24 * 3 * 2 * 4 * 2, 24 * 3 * 1 * 4 * 2  # of 2 and 1 heads for each of 3 others
    (one, *_), (biased, *_), (parts, *_) = (
        sent(count(replace(plain, form=form))) for form in ("plain", "biased", "parts")
    )
    assert biased == one + Sent(24 * 8 * 3, 0)
    assert parts == one + Sent(query + key, query + key)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("form", ["biased", "parts"])
def test_the_models_own_call_of_a_form_sends_the_same(form: str, chunks: int) -> None:
    case = Case(4, 1, chunks, 8, 4, 4, (31, 1, 40, 24), form=form)
    tokens = sum(case.lengths)
    mask = MaskSpec.from_lengths(list(case.lengths), causal=True)

    def rank(comm: Comm) -> Sent:
        counting = CountingComm(comm)
        mesh = build_mesh(counting, ulysses_size=4, ring_size=1)
        ops, _ = sequence_ops(NoKernel(), mesh, chunks)
        q, k, v = (
            torch.zeros((1, tokens // 4, heads, 4), dtype=case.dtype, requires_grad=True)
            for heads in (8, 4, 4)
        )
        positions = torch.arange(tokens // 4)[None] + comm.rank * tokens // 4
        counting.messages.clear()
        if form == "biased":
            out = ops.attend_biased(q, k, v, mask, 1.0, alibi_bias(positions, positions, 8))
        else:
            out = ops.attend_parts([ScorePart(q, k, mask), ScorePart(q * 2, k * 2, mask)], v, 1.0)
        number = len(counting.messages)
        out.sum().backward()
        sizes = [message.sent for message in counting.messages]
        return Sent(sum(sizes[:number]), sum(sizes[number:]))

    assert run_in_process(4, rank) == formula(case)


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


def test_the_backward_of_ulysses_makes_each_result_when_its_message_comes() -> None:
    counted = count(Case(4, 1, 1, 32, 16, 16, (4096,), dtype=torch.bfloat16))
    # In units of q, keys and values half each: kept are q, k, v, out and lse; then come the kernel's gradients, and
    # at most dq's message, which in-process ranks hold where it was sent too, and its place here.
    kept, gradients = 1 + 0.5 + 0.5 + 1 + 4 / (2 * 16), 1 + 0.5 + 0.5
    unit = 4096 // 4 * 32 * 16 * 2
    assert max(rank.backward_peak for rank in counted) == unit * (kept + gradients + 3)


def test_the_benchmark_reports_and_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = AttentionSettings(2, 64, 4, 2, 8, (30, 0.5), None, (2, 8), 8192)
    assert run_attention(settings, tmp_path / "a.json") == 0
    written = json.loads((tmp_path / "a.json").read_text())
    assert all(row["equals_formula"] for row in written["schemes"])
    assert {row["form"] for row in written["schemes"]} == {"plain", "biased", "parts"}
    assert {row["ring_size"] for row in written["balance"]} == {2, 8}
    assert "= formula" in capsys.readouterr().out
