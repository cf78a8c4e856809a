import json
import shutil
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from test_data_tiny import VOCAB_SIZE, tiny

from roformer_dist.batch import IGNORE_INDEX
from roformer_dist.data.errors import DataError
from roformer_dist.data.loader import Loader, evaluation_batches
from roformer_dist.data.objective import CausalObjective, MaskedObjective
from roformer_dist.data.packing import make_plan
from roformer_dist.data.plan import PackOptions, Plan
from roformer_dist.data.stages import Source, Stage
from roformer_dist.data.state import DataState
from roformer_dist.data.store import ShardStore

CAUSAL = CausalObjective()
MASKED = MaskedObjective(mask_id=4, vocab_size=VOCAB_SIZE)
B = 8


def loader(store=None, plan=None, *, seed=7, micro=2, dp_rank=0, dp_size=1, objective=CAUSAL, workers=0):
    return Loader(
        [Stage((Source(store or tiny().store, (plan or tiny().plan(),)),))],
        seed=seed,
        seq_len=64,
        global_batch=B,
        micro_batch_size=micro,
        dp_rank=dp_rank,
        dp_size=dp_size,
        objective=objective,
        workers=workers,
    )


def by_slot(steps_of_ranks):
    """Every row of the same step on all ranks, by slot, and the counts the ranks report."""
    result = []
    for steps in zip(*steps_of_ranks):
        rows = {}
        for step in steps:
            for batch in step.micro_batches:
                for r in range(len(batch.input_ids)):
                    slot = int(batch.counters[r, 0]) // batch.counters.shape[1]
                    fields = (batch.input_ids, batch.labels, batch.position_ids, batch.counters)
                    assert slot not in rows
                    rows[slot] = [field[r].tolist() for field in fields]
        counts = {(step.num_valid, step.num_tokens, step.state) for step in steps}
        assert len(counts) == 1
        result.append((sorted(rows.items()), counts))
    return result


def take(steps, **kwargs):
    size = kwargs.pop("dp_size", 1)
    shares = []
    for rank in range(size):
        with loader(dp_rank=rank, dp_size=size, **kwargs) as share:
            shares.append(list(islice(share, steps)))
    return by_slot(shares)


@pytest.mark.parametrize("objective", [CAUSAL, MASKED])
@pytest.mark.parametrize(
    ("dp_size", "micro", "workers"),
    [(1, 8, 0), (1, 1, 4), (2, 1, 0), (2, 4, 1), (4, 2, 0), (4, 1, 4), (8, 1, 1)],
)
def test_a_step_does_not_depend_on_the_mesh(objective, dp_size, micro, workers):
    steps = tiny().plan().num_rows // B + 2  # over the end of an epoch, which falls inside a step
    assert tiny().plan().num_rows % B
    expected = take(steps, objective=objective)
    assert take(steps, dp_size=dp_size, micro=micro, workers=workers, objective=objective) == expected


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("stop", [1, 3])
def test_resuming_on_another_mesh_continues_exactly(workers, stop):
    expected = take(6)
    with loader(workers=workers) as first:
        for _ in range(stop):
            state = next(first).state
        assert first.state == state  # what was read ahead does not count
    stored = DataState.from_dict(json.loads(json.dumps(state.to_dict())))
    shares = []
    for rank in range(2):
        with loader(dp_rank=rank, dp_size=2, micro=4, workers=workers) as resumed:
            next(resumed)  # a state may be loaded into a loader that has already run
            resumed.load_state(stored)
            shares.append(list(islice(resumed, 6 - stop)))
    assert by_slot(shares) == expected[stop:]


@pytest.mark.parametrize("objective", [CAUSAL, MASKED])
def test_num_valid_is_the_true_count_of_the_whole_step(objective):
    for step in islice(loader(objective=objective), 12):
        assert step.num_valid == sum(batch.num_valid for batch in step.micro_batches)
        assert step.num_tokens == B * 64
    quarter = next(loader(objective=objective, dp_size=4, dp_rank=1))
    assert quarter.num_valid == next(loader(objective=objective)).num_valid


def test_an_epoch_gives_every_row_once_and_the_next_differs():
    rows = tiny().plan().num_rows
    found = []
    for step in islice(loader(micro=8), 2 * rows // B + 1):
        found += [tuple(row.tolist()) for row in step.micro_batches[0].input_ids]
    first, second = found[:rows], found[rows : 2 * rows]
    whole = [tuple(b.input_ids[0].tolist()) for b in evaluate(None, 1)]
    assert sorted(first) == sorted(second) == sorted(whole)
    assert first != second


def hand_made(tmp_path):
    """Rows of 8: [5 tokens of a long document | 2 of a short one | padding], [the long one's rest]."""
    from roformer_dist.data.inputs import find_inputs
    from roformer_dist.data.shards import write_shards

    (tmp_path / "long.txt").write_text("1234567")
    (tmp_path / "short.txt").write_text("9")
    files = find_inputs([str(tmp_path / name) for name in ("long.txt", "short.txt")])
    write_shards(files, tiny().tokenizer, tmp_path / "shards")
    store = ShardStore(tmp_path / "shards")
    assert store.lengths.tolist() == [8, 2]
    array = np.array
    return store, Plan(
        8, store.root, PackOptions(), array([0, 2, 3]), array([0, 1, 0]), array([0, 0, 5]), array([5, 2, 3]),
        array([False, True, True]), array([0, 2]),
    )  # fmt: skip


def test_labels_positions_counters_and_mask_by_example(tmp_path):
    store, plan = hand_made(tmp_path)
    d1, d2, d3, d4, d5, d6, d7 = tiny().tokenizer.encode("1234567").tolist()
    d9, eos, pad, no = tiny().tokenizer.encode("9").item(), 2, 3, IGNORE_INDEX
    (batch,) = evaluation_batches(
        store, plan, rows=None, micro_batch_size=2, dp_rank=0, dp_size=1, objective=CAUSAL
    )
    assert batch.input_ids.tolist() == [
        [d1, d2, d3, d4, d5, d9, eos, pad],
        [d6, d7, eos, pad, pad, pad, pad, pad],
    ]
    # d5 looks ahead to d6 in the other row; neither the end of a document nor padding has a target.
    assert batch.labels.tolist() == [
        [d2, d3, d4, d5, d6, eos, no, no],
        [d7, eos, no, no, no, no, no, no],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0], [0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch.counters.tolist() == [list(range(8)), list(range(8, 16))]
    assert batch.mask.cu_seqlens_q.tolist() == [0, 5, 7, 8, 11, 16]
    assert batch.mask.causal
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert [plan.has_target(row).sum() for row in range(2)] == [6, 2]


def test_masked_objective_never_hides_padding_or_ends(tmp_path):
    store, plan = hand_made(tmp_path)
    everything = MaskedObjective(
        mask_id=4,
        vocab_size=VOCAB_SIZE,
        mask_probability=1.0,
        replace_with_mask=1.0,
        replace_with_random=0.0,
    )
    (batch,) = evaluation_batches(
        store, plan, rows=None, micro_batch_size=2, dp_rank=0, dp_size=1, objective=everything
    )
    assert batch.input_ids.tolist() == [[4, 4, 4, 4, 4, 4, 2, 3], [4, 4, 2, 3, 3, 3, 3, 3]]
    hidden = [*tiny().tokenizer.encode("123459").tolist()], [*tiny().tokenizer.encode("67").tolist()]
    assert batch.labels.tolist() == [[*hidden[0], -100, -100], [*hidden[1], *[-100] * 6]]
    assert not batch.mask.causal


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_damage_surfaces_at_next_and_does_not_skip(tmp_path, workers):
    folder = shutil.copytree(tiny().root / "shards", tmp_path / "shards")
    path = folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    offset = int(np.load(folder / "shard-000001.idx.npy")["offset"][0])
    data[offset] ^= 1
    path.write_bytes(data)
    with ShardStore(folder) as store, loader(store, workers=workers) as broken:
        with pytest.raises(DataError, match=r"shard-000001\.tar: document \d+ is damaged"):
            list(islice(broken, tiny().plan().num_rows))
        done = broken.state.next_slot
        with pytest.raises(DataError, match="is damaged"):
            next(broken)
        assert broken.state.next_slot == done


def test_state_is_small_and_refuses_other_data():
    state = next(loader()).state
    assert state.next_slot == B
    assert len(json.dumps(state.to_dict())) < 1024
    others = {
        "manifest_root": "0" * 64,
        "plan_hash": (make_plan(tiny().store, 64, seed=9).hash,),
        "seed": 8,
        "global_batch": 16,
        "seq_len": 128,
    }
    for name, value in others.items():
        with pytest.raises(DataError, match=f"the checkpoint has {name}=.*, this run has {name}=") as caught:
            loader().load_state(replace(state, **{name: value}))
        for shown in (value, getattr(state, name)):
            assert (shown[0] if isinstance(shown, tuple) else str(shown)) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="not a multiple"):
        loader().load_state(replace(state, next_slot=5))
    with pytest.raises(DataError, match="next_slot=-8 is not a multiple"):
        loader().load_state(replace(state, next_slot=-8))
    with pytest.raises(DataError, match="documents of 2 shards folders, this run has 1"):
        loader().load_state(replace(state, quarantined=((), ())))
    values = state.to_dict()
    for bad in (
        {**values, "extra": 1},
        {**values, "seed": "7"},
        {"version": 2},
        {**values, "plan_hash": [1]},
        {**values, "next_slot": True},
        {**values, "manifest_root": None},
        {**values, "quarantined": [3]},
        {**values, "quarantined": [["3"]]},
    ):
        with pytest.raises(DataError, match="data state has"):
            DataState.from_dict(bad)
    with pytest.raises(DataError, match="has version 1, this program reads 2"):
        DataState.from_dict({**values, "version": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro": 3}, r"global_batch=8 .* 1 \* 3 = 3"),
        ({"dp_size": 2, "dp_rank": 2}, "dp_rank=2 .* dp_size=2"),
        ({"micro": 0}, "micro_batch_size=0"),
        ({"workers": -1}, "workers=-1"),
        ({"plan": replace(tiny().plan(), manifest_root="other")}, "made for other"),
    ],
)
def test_bad_numbers_are_refused_with_one_line(changes, message):
    with pytest.raises(DataError, match=message) as caught:
        loader(**changes)
    assert "\n" not in str(caught.value)


def evaluate(rows, micro, dp_rank=0, dp_size=1):
    return list(
        evaluation_batches(
            tiny().store,
            tiny().plan(),
            rows=rows,
            micro_batch_size=micro,
            dp_rank=dp_rank,
            dp_size=dp_size,
            objective=CAUSAL,
        )
    )


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 4), (2, 3), (4, 2), (4, 1)])
def test_evaluation_gives_every_row_once_and_ranks_equally_many_batches(dp_size, micro):
    expected = {tuple(b.input_ids[0].tolist()): b.num_valid for b in evaluate(13, 1)}
    assert len(expected) == 13
    shares = [evaluate(13, micro, rank, dp_size) for rank in range(dp_size)]
    assert len({len(share) for share in shares}) == 1
    assert all(len(batch.input_ids) == micro for share in shares for batch in share)
    rows = [row for share in shares for batch in share for row in zip(batch.input_ids, batch.labels)]
    found = {tuple(ids.tolist()): int((labels != -100).sum()) for ids, labels in rows if (ids != 3).any()}
    assert found == expected
    assert sum(batch.num_valid for share in shares for batch in share) == sum(expected.values())
    with pytest.raises(DataError, match="rows=0 must be at least 1, or None for all"):
        evaluate(0, micro)
