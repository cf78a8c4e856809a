"""Delivery as a whole: exact at any mesh after any stop, complete epochs, exact mixtures, a small state."""

from __future__ import annotations

import contextlib
import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from data_runs import (
    CAUSAL,
    KINDS,
    MASKED,
    SEED,
    SEQ_LEN,
    Assembler,
    B,
    loader,
    next_step,
    other_store,
    sha256_of,
    stages_of,
    uninterrupted,
)
from test_data_tiny import tiny

from roformer_dist.data.errors import DataError
from roformer_dist.data.loader import Loader
from roformer_dist.data.packing import make_plan
from roformer_dist.data.stages import Source, Stage, Timeline, _bucket_quotas
from roformer_dist.data.state import DataState
from roformer_dist.parallel.layout import ContiguousLayout, Layout, ZigzagLayout

STEPS = 24
LAYOUTS: dict[int, list[Layout]] = {
    1: [ContiguousLayout(1)],
    2: [ContiguousLayout(2), ZigzagLayout(2)],
    4: [ContiguousLayout(4), ZigzagLayout(2, 2)],
}
PAD = 3
assembled = Assembler()


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_stopped_anywhere_any_mesh_goes_on_with_the_same_batches(kind: str, workers: int) -> None:
    expected = uninterrupted(kind, STEPS)
    stops = random.Random(kind).sample(range(1, STEPS), 10)
    for dp_size in (1, 2, 4, 8):
        with contextlib.ExitStack() as stack:
            ranks = [
                stack.enter_context(loader(kind, dp_rank=r, dp_size=dp_size, workers=workers))
                for r in range(dp_size)
            ]
            for stop in stops:
                stored = DataState.from_dict(json.loads(json.dumps(expected[stop - 1][2].to_dict())))
                for rank in ranks:
                    rank.load_state(stored)
                found = next_step(ranks)
                digest, num_valid, state = expected[stop]
                assert {(step.num_valid, step.state) for step in found} == {(num_valid, state)}
                batches = [batch for step in found for batch in step.micro_batches]
                for sp_size, layouts in LAYOUTS.items():
                    for layout in layouts:
                        parts = [assembled(batch, layout) for batch in batches]
                        assert sha256_of(parts) == digest, (stop, dp_size, sp_size, layout)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_hands_out_the_states_of_a_whole_one(kind: str) -> None:
    """To the end, with a stop and another mesh after every few steps."""
    expected, state = uninterrupted(kind, STEPS, MASKED), None
    draw = random.Random(kind)
    found = []
    while len(found) < STEPS:
        dp_size, workers = draw.choice([1, 2, 4, 8]), draw.choice([0, 1, 4])
        with contextlib.ExitStack() as stack:
            ranks = [
                stack.enter_context(
                    loader(kind, dp_rank=r, dp_size=dp_size, workers=workers, objective=MASKED)
                )
                for r in range(dp_size)
            ]
            if state is not None:
                for rank in ranks:
                    rank.load_state(state)
            for _ in range(min(draw.randint(1, 6), STEPS - len(found))):
                steps = next_step(ranks)
                state = steps[0].state
                batches = [batch for step in steps for batch in step.micro_batches]
                found.append((sha256_of(batches), steps[-1].num_valid, state))
                assert sum(batch.num_valid for batch in batches) == steps[0].num_valid
    assert found == expected


def test_a_state_says_the_stage_of_the_next_step() -> None:
    stages = [state.stage for _, _, state in uninterrupted("stages", STEPS, MASKED)]
    assert stages == [sum(step >= first for first in (5, 11, 15)) for step in range(1, STEPS + 1)]


def test_the_damaged_documents_are_found_and_stay_left_out() -> None:
    states = [state for _, _, state in uninterrupted("quarantine", STEPS)]
    counts = [state.num_quarantined for state in states]
    assert counts == sorted(counts)
    assert counts[-1] == 2
    assert counts[0] < 2  # the ten stops lie before and after


def epochs(kind: str, num_epochs: int) -> list[list[tuple[int, ...]]]:
    """The rows of each epoch as tokens, in order; a step is one row."""
    (source,) = stages_of(kind)[0].sources
    (plan,) = source.plans
    rows = []
    with Loader(
        stages_of(kind),
        seed=SEED,
        seq_len=plan.seq_len,
        global_batch=1,
        micro_batch_size=1,
        dp_rank=0,
        dp_size=1,
        objective=CAUSAL,
    ) as steps:
        for _ in range(num_epochs * plan.num_rows):
            rows.append(tuple(next(steps).micro_batches[0].input_ids[0].tolist()))
    return [rows[n * plan.num_rows : (n + 1) * plan.num_rows] for n in range(num_epochs)]


def test_an_epoch_has_every_token_of_the_manifest_once_and_the_next_another_order() -> None:
    first, second = epochs("short form", 2)
    assert sorted(first) == sorted(second)
    assert first != second
    assert sum(token != PAD for row in first for token in row) == tiny().store.manifest.tokens
    every = sorted(t for d in range(len(tiny().store)) for t in tiny().store.read(d).tolist())
    assert sorted(token for row in first for token in row if token != PAD) == every


def test_buckets_give_every_document_once_in_an_epoch_of_each() -> None:
    (source,) = stages_of("buckets")[0].sources
    timeline = Timeline(stages_of("buckets"), seed=SEED, seq_len=SEQ_LEN, global_batch=B)
    seen: dict[int, list[int]] = {plan.seq_len: [] for plan in source.plans}
    number = 0
    tokens = {plan.seq_len: plan.num_rows * plan.seq_len for plan in source.plans}
    while any(len(seen[plan.seq_len]) < plan.num_rows for plan in source.plans):
        (part,) = timeline.parts(number)  # a step is of one length
        seen[part.plan.seq_len] += part.rows.ravel().tolist()
        number += 1
        for plan in source.plans:  # in proportion to tokens, at any step
            share = number * tokens[plan.seq_len] / sum(tokens.values())
            assert abs(len(seen[plan.seq_len]) * plan.seq_len / (B * SEQ_LEN) - share) < 1.01
    documents = [
        plan.document[plan.row_offsets[row]]
        for plan in source.plans
        for row in dict.fromkeys(seen[plan.seq_len][: plan.num_rows])
    ]
    assert sorted(set(documents)) == list(range(len(tiny().store)))
    assert sum(plan.num_tokens for plan in source.plans) == tiny().store.manifest.tokens


def test_no_bucket_is_left_out_however_few_its_tokens() -> None:
    sizes = [SimpleNamespace(plan=SimpleNamespace(num_rows=rows, seq_len=64)) for rows in (10**8, 1)]
    assert _bucket_quotas(sizes) == [10_000, 1]  # type: ignore[arg-type]


def test_sources_that_do_not_go_together_are_one_line() -> None:
    store, other = tiny().store, other_store()
    plain, short = Source(store, (tiny().plan(),)), Source(other, (make_plan(other, 48),))
    (buckets,) = stages_of("buckets")[0].sources
    for sources, message in (
        ((plain, plain), "a stage names the same plan twice; name it once"),
        ((short,), r"rows of 48 tokens, which do not fill train\.seq_len = 64 evenly; run data pack"),
        (
            (plain, replace(stages_of("mixture")[0].sources[1], weight=1e-6)),
            "weight 1e-06 of .* less than one row",
        ),
        ((plain, buckets), "a stage mixes 2 sources, one of them in buckets"),
        ((buckets, plain), "a stage mixes 2 sources, one of them in buckets"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            Timeline([Stage(sources)], seed=SEED, seq_len=SEQ_LEN, global_batch=B)
        assert "\n" not in str(caught.value)


def test_what_a_mixture_draws_meets_its_quotas() -> None:
    """At every slot within one of the share; exact at the end of each block (20 slots), also across steps."""
    timeline = Timeline(stages_of("mixture"), seed=SEED, seq_len=SEQ_LEN, global_batch=B)
    lengths = {SEQ_LEN: 11, 32: 6, 16: 3}  # weights 0.55, 0.3 and 0.15
    slots = 40 * B
    drawn = np.zeros((slots, 3), dtype=np.int64)
    for step in range(40):
        for part in timeline.parts(step):
            drawn[part.slots, list(lengths).index(part.plan.seq_len)] += 1
            assert part.rows.shape == (len(part.slots), SEQ_LEN // part.plan.seq_len)
    assert (drawn.sum(1) == 1).all()
    counts = drawn.cumsum(0)
    quotas = np.array(list(lengths.values()))
    assert (np.abs(counts - np.arange(1, slots + 1)[:, None] * quotas / 20) < 1).all()
    blocks = np.arange(20, slots + 1, 20)
    assert (counts[blocks - 1] == (blocks // 20)[:, None] * quotas).all()


@pytest.mark.parametrize("with_buckets", [False, True])
def test_a_source_of_several_stages_goes_on_where_it_stood(with_buckets: bool) -> None:
    store, other = tiny().store, other_store()
    plain, short = Source(store, (tiny().plan(),)), Source(other, (make_plan(other, 32),))
    if with_buckets:
        ((short,),) = (stage.sources for stage in stages_of("buckets"))
    mixed = (plain,) if with_buckets else (plain, short)
    stages = [
        Stage((plain,), 2),
        Stage(mixed, 4),
        Stage((short,), 3),
        Stage((plain,), 1),
        Stage((short,), 90),
    ]
    timeline = Timeline([*stages, Stage((plain,))], seed=SEED, seq_len=SEQ_LEN, global_batch=B)
    found: dict[str, list[int]] = {plan.hash: [] for plan in (*plain.plans, *short.plans)}
    for step in range(150):
        assert timeline.stage_of(step) == sum(step >= first for first in (2, 6, 9, 10, 100))
        for part in timeline.parts(step):
            found[part.plan.hash] += part.rows.ravel().tolist()
    for plan in (*plain.plans, *short.plans):
        rows = found[plan.hash]
        for epoch in range(len(rows) // plan.num_rows):
            of_epoch = rows[epoch * plan.num_rows : (epoch + 1) * plan.num_rows]
            assert sorted(of_epoch) == list(range(plan.num_rows))
        assert len(rows) > plan.num_rows
