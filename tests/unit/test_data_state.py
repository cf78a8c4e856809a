"""What is kept between runs: small, quick to go on from, and bound to the data it was taken of."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from data_runs import KINDS, SEED, SEQ_LEN, B, loader, stages_of
from test_data_tiny import tiny

from roformer_dist.config.data import MAX_FOLDERS, DataConfig, StageConfig, WeightedSourceConfig
from roformer_dist.data import order
from roformer_dist.data.errors import DataError
from roformer_dist.data.packing import make_plan
from roformer_dist.data.plan import PackOptions, Plan
from roformer_dist.data.shards import write_shards
from roformer_dist.data.stages import HASH_DIGITS, Source, Stage, Timeline
from roformer_dist.data.state import MAX_QUARANTINED, DataState, check_same_data
from roformer_dist.data.store import ShardStore
from roformer_dist.engine.feed import Feed


def timeline(stages: Any, *, seed: int = SEED, global_batch: int = B) -> Timeline:
    return Timeline(stages, seed=seed, seq_len=SEQ_LEN, global_batch=global_batch)


def size(state: DataState) -> int:
    return len(json.dumps(state.to_dict(), separators=(",", ":")))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_under_a_kilobyte_with_all_that_it_may_quarantine(kind: str) -> None:
    state = replace(DataState.first(timeline(stages_of(kind))), next_slot=10**12)
    last = len(state.quarantined) - 1
    full = state.leave_out([(n % (last + 1), 10**12 - n) for n in range(MAX_QUARANTINED)])
    assert full.num_quarantined == MAX_QUARANTINED
    assert size(full) < 1024
    assert DataState.from_dict(json.loads(json.dumps(full.to_dict()))) == full
    assert full.leave_out([(0, 10**12)]) == full  # known already
    with pytest.raises(DataError, match="33 documents are damaged, more than the 32") as caught:
        full.leave_out([(last, 5)])
    assert "\n" not in str(caught.value)


def test_more_stages_than_a_state_holds_are_refused_at_the_start() -> None:
    plain = Source(tiny().store, (tiny().plan(),))
    with pytest.raises(DataError, match=r"40 stages of 1 shards folders need \d+ bytes .* use fewer"):
        DataState.first(timeline([*(Stage((plain,), 1) for _ in range(39)), Stage((plain,))]))


def test_as_many_stages_and_folders_as_a_configuration_may_have_fit() -> None:
    many = SimpleNamespace(
        seed=2**63,
        global_batch=10**6,
        seq_len=2**20,
        plan_hashes=("a" * HASH_DIGITS,) * 8,
        manifest_root="b" * HASH_DIGITS,
        stores=[None] * MAX_FOLDERS,
    )
    state = replace(DataState.first(cast(Timeline, many)), next_slot=10**12)
    assert size(state.leave_out([(MAX_FOLDERS - 1, 10**12 - n) for n in range(MAX_QUARANTINED)])) <= 1024
    stages = tuple(
        StageConfig(num_steps=1, sources=tuple(_weighted(16 * number + n) for n in range(16)))
        for number in range(3)
    )
    data = {"tokenizer": "t", "validation": {"shards": "v", "plan": "v"}}
    assert DataConfig.model_validate({**data, "stages": stages[:2]}).training == stages[:2]
    with pytest.raises(ValueError, match="stages: 48 shards folders, more than the 32 whose position fits"):
        DataConfig.model_validate({**data, "stages": stages})


def _weighted(number: int) -> WeightedSourceConfig:
    return WeightedSourceConfig(shards=f"shards/{number}", plan="plan.npz", weight=1.0)


def huge_plan(rows: int) -> Plan:
    """A plan of which only what the order needs has its size: 20,000 shard groups."""
    nothing = np.broadcast_to(np.int64(0), (rows + 1,))
    groups = np.linspace(0, rows, 20_001).astype(np.int64)
    options = PackOptions(window=8)
    plan = Plan(SEQ_LEN, "root", options, nothing, nothing, nothing, nothing, nothing, groups)
    plan.__dict__["hash"] = "ab" * 32
    return plan


def test_resuming_in_a_hundred_million_rows_costs_what_the_shard_groups_and_a_step_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashed = 0
    absorb = order.absorb

    def counted(state: np.ndarray, part: np.ndarray) -> np.ndarray:
        nonlocal hashed
        hashed += part.size
        return absorb(state, part)

    monkeypatch.setattr(order, "absorb", counted)
    store = cast("ShardStore", SimpleNamespace(root="root", path="shards"))
    stages = [Stage((Source(store, (huge_plan(10**8),)),))]
    started = time.process_time()
    resumed = timeline(stages, global_batch=512)
    state = replace(DataState.first(resumed), next_slot=512 * 1_234_567)
    check_same_data(DataState.from_dict(json.loads(json.dumps(state.to_dict()))), DataState.first(resumed))
    (part,) = resumed.parts(state.step)
    seconds = time.process_time() - started
    assert len(set(part.rows.ravel().tolist())) == 512
    # Six rounds of two hashes, for each group and each of at most 1,024 slots, and what falls outside once more.
    assert hashed < 30 * (20_000 + 1_024)
    assert seconds < 2


def test_data_that_changed_is_refused_with_both_hashes(tmp_path) -> None:
    folder = shutil.copytree(tiny().root / "text", tmp_path / "text")
    (folder / "d07.txt").write_text("another text")
    from roformer_dist.data.inputs import find_inputs

    write_shards(find_inputs([str(folder)]), tiny().tokenizer, tmp_path / "shards", shard_bytes=4096)
    changed = ShardStore(tmp_path / "shards")
    before = DataState.first(timeline(stages_of("short form")))
    other_shards = [Stage((Source(changed, (make_plan(changed, SEQ_LEN, seed=3),)),))]
    other_plan = [Stage((Source(tiny().store, (make_plan(tiny().store, SEQ_LEN, seed=4),)),))]
    for name, stages in (("manifest_root", other_shards), ("plan_hash", other_plan)):
        now = DataState.first(timeline(stages))
        with pytest.raises(DataError, match=f"the checkpoint has {name}=") as caught:
            check_same_data(before, now)
        for state in (before, now):
            value = getattr(state, name)
            assert (value if isinstance(value, str) else value[0]) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_other_weights_lengths_of_stages_or_order_of_stages_are_other_data() -> None:
    first, short, _, last = stages_of("stages")
    weighted = replace(short, sources=(replace(short.sources[0], weight=0.31), short.sources[1]))
    before = DataState.first(timeline([first, short, last]))
    for stages in ([first, weighted, last], [replace(first, num_steps=6), short, last], [first, last]):
        with pytest.raises(DataError, match=r"the checkpoint has (plan_hash|manifest_root)="):
            check_same_data(before, DataState.first(timeline(stages)))
    then = Stage(short.sources[:1])
    states = [DataState.first(timeline([replace(first, num_steps=steps), then])) for steps in (5, 6)]
    with pytest.raises(DataError, match="the checkpoint has plan_hash="):
        check_same_data(*states)


def test_another_seed_or_step_size_is_refused_with_both_numbers() -> None:
    state = next(loader("mixture")).state
    with pytest.raises(DataError, match="the checkpoint has seed=7, this run has seed=8"):
        loader("mixture", seed=8).load_state(state)
    with pytest.raises(DataError, match=r"global_batch=8, .*=16 \(tokens_per_step 512 and 1024\)"):
        loader("mixture", global_batch=16).load_state(state)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_wait_for_data_is_what_a_slow_store_takes(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    read = ShardStore.read_stored

    def slow(self: ShardStore, *arguments: Any) -> np.ndarray:
        time.sleep(0.02)
        return read(self, *arguments)

    monkeypatch.setattr(ShardStore, "read_stored", slow)
    with loader("short form", workers=workers) as steps:
        feed = Feed(steps, quarantine=False)
        feed.read()  # with workers, this one is waited for in any case
        feed.wait = 0.0
        if workers:
            time.sleep(2.0)  # the next steps are read meanwhile
        started = time.perf_counter()
        feed.read()
        took = time.perf_counter() - started
        assert feed.wait <= took
        if workers:
            assert feed.wait < B * 0.02
        else:
            assert feed.wait >= B * 0.02  # each row has a document at least
        before = feed.wait
        feed.read()
        assert feed.wait > before  # it adds up until it is set to 0
