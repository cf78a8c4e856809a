import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_tiny import tiny

from roformer_dist.data import packing
from roformer_dist.data.errors import DataError
from roformer_dist.data.order import rows_of_slots
from roformer_dist.data.packing import Plan, make_plan, verify_plan


class Lengths:
    """A store of which only lengths exist, for packing."""

    def __init__(self, lengths):
        self.lengths, self.root, self.path = np.array(lengths, dtype=np.int64), "root", "lengths"

    def __len__(self):
        return len(self.lengths)

    @property
    def num_tokens(self):
        return int(self.lengths.sum())


@pytest.mark.parametrize("method", packing.METHODS)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=40), seq_len=st.integers(2, 20))
@settings(deadline=None, max_examples=150)
def test_every_token_is_in_exactly_one_place(method, lengths, seq_len):
    plan = make_plan(Lengths(lengths), seq_len, method=method, seed=1)
    seen = [np.zeros(length, int) for length in lengths]
    for row in range(plan.num_rows):
        pieces = plan.pieces(row)
        assert 1 <= plan.length[pieces].sum() <= seq_len
        for document, start, length in zip(plan.document[pieces], plan.start[pieces], plan.length[pieces]):
            seen[document][start : start + length] += 1
    assert all((count == 1).all() for count in seen)
    assert verify_plan(plan, Lengths(lengths)) is None
    assert plan.targets_per_row.sum() == sum(lengths) - len(lengths)
    assert [plan.has_target(row).sum() for row in range(plan.num_rows)] == plan.targets_per_row.tolist()


def test_best_fit_by_example():
    plan = make_plan(Lengths([25, 6, 4, 3, 5]), 10)
    rows = sorted(
        sorted(zip(*(a[plan.pieces(r)].tolist() for a in (plan.document, plan.start, plan.length))))
        for r in range(plan.num_rows)
    )
    # Remainders longest first: 6, then two of 5 share a row, then 4 fits beside 6, then 3.
    assert rows == [
        [(0, 0, 10)],
        [(0, 10, 10)],
        [(0, 20, 5), (4, 0, 5)],
        [(1, 0, 6), (2, 0, 4)],
        [(3, 0, 3)],
    ]


def test_best_fit_leaves_little_padding_and_scales():
    generator = np.random.default_rng(0)
    store = Lengths(np.minimum(generator.lognormal(7, 1.6, 50_000).astype(int) + 1, 10**6))
    plan = make_plan(store, 131_072)
    assert plan.padding < 0.001
    assert plan.num_tokens == store.num_tokens


def test_long_documents_stay_whole_where_they_fit():
    store = tiny().store
    plan = make_plan(store, 16_384)
    assert plan.ends_document.all()
    assert make_plan(store, 64, method="concat").padding <= make_plan(store, 64).padding


def test_plan_file_round_trip_and_determinism(tmp_path):
    plan = tiny().plan()
    for name in ("a.npz", "b.npz"):
        make_plan(tiny().store, 64, seed=3).save(tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    loaded = Plan.load(tmp_path / "a.npz")
    assert loaded.hash == plan.hash
    assert np.array_equal(loaded.start, plan.start)
    assert (loaded.seq_len, loaded.method, loaded.seed) == (64, "best-fit", 3)
    assert loaded.manifest_root == tiny().store.root
    others = [
        make_plan(tiny().store, 65, seed=3),
        make_plan(tiny().store, 64, seed=4),
        make_plan(tiny().store, 64, seed=3, method="concat"),
    ]
    assert len({plan.hash, *(other.hash for other in others)}) == 4


def test_a_changed_plan_is_found(tmp_path):
    plan = tiny().plan()
    path = tmp_path / "plan.npz"
    with np.load(_saved(plan, path)) as file:
        arrays = dict(file)
    arrays["start"] = arrays["start"].copy()
    arrays["start"][0] += 1
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=r"plan.npz: hash .* recorded .* pack it again"):
        Plan.load(path)
    path.write_bytes(_saved(plan, path).read_bytes()[:-100])
    with pytest.raises(DataError, match=r"plan.npz: not a plan, or damaged"):
        Plan.load(path)
    with pytest.raises(DataError, match="no such plan"):
        Plan.load(tmp_path / "absent.npz")


def _saved(plan, path):
    plan.save(path)
    return path


def test_verify_plan_finds_tokens_that_are_twice_missing_or_foreign():
    plan, store = tiny().plan(), tiny().store
    assert verify_plan(plan, store) is None
    twice = Plan(**{**vars_of(plan), "start": plan.start + (plan.start > 0)})
    assert "twice or not at all" in verify_plan(twice, store)
    fewer = Plan(**{**vars_of(plan), "length": plan.length - (plan.length == plan.length.min())})
    assert verify_plan(fewer, store) is not None
    foreign = Plan(**{**vars_of(plan), "manifest_root": "other"})
    assert "made for manifest root other" in verify_plan(foreign, store)


def vars_of(plan):
    return {name: getattr(plan, name) for name in Plan.__dataclass_fields__}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_plan(Lengths([3]), 1), "--seq-len 1"),
        (lambda: make_plan(Lengths([3]), 8, method="bucket"), "unknown; use best-fit or concat"),
        (lambda: make_plan(Lengths([]), 8), "nothing to pack"),
    ],
)
def test_errors_are_one_line(call, message):
    with pytest.raises(DataError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@given(num_rows=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_order_is_a_permutation_of_each_epoch(num_rows, seed, epoch):
    slots = np.arange(num_rows) + epoch * num_rows
    rows = rows_of_slots(slots, num_rows=num_rows, seed=seed)
    assert np.array_equal(np.sort(rows), np.arange(num_rows))


def test_order_differs_by_epoch_and_seed_and_mixes():
    n = 1000
    first = rows_of_slots(np.arange(n), num_rows=n, seed=1)
    second = rows_of_slots(np.arange(n, 2 * n), num_rows=n, seed=1)
    other = rows_of_slots(np.arange(n), num_rows=n, seed=2)
    for a, b in ((first, second), (first, other), (first, np.arange(n))):
        assert (a == b).mean() < 0.02
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.15
    # Several epochs at once, in any order, are the same as one by one.
    slots = np.arange(2 * n)[::-7]
    assert np.array_equal(rows_of_slots(slots, num_rows=n, seed=1), np.concatenate([first, second])[slots])


def page_hash(*parts):
    """The hash of docs/data_format.md, written from the page with plain integers."""

    def mix(v):
        v %= 2**64
        v = (v ^ v >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        v = (v ^ v >> 27) * 0x94D049BB133111EB % 2**64
        return v ^ v >> 31

    state = 0
    for part in parts:
        state = mix((state + 0x9E3779B97F4A7C15) % 2**64 ^ mix(part + 0x9E3779B97F4A7C15))
    return state


def page_row(slot, rows, seed):
    epoch, i = divmod(slot, rows)
    height = math.ceil(math.sqrt(rows))
    width = math.ceil(rows / height)
    while True:
        y, x = divmod(i, width)
        for n in range(6):
            if n % 2 == 0:
                y = (y + page_hash(seed, n, epoch, x)) % height
            else:
                x = (x + page_hash(seed, n, epoch, y)) % width
        i = y * width + x
        if i < rows:
            return i


@pytest.mark.parametrize("rows", [1, 2, 3, 17, 291])
def test_order_is_what_the_format_page_says(rows):
    slots = np.arange(3 * rows)
    assert rows_of_slots(slots, num_rows=rows, seed=7).tolist() == [
        page_row(s, rows, 7) for s in range(3 * rows)
    ]
