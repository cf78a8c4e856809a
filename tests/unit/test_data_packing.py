import bisect
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_tiny import tiny

from roformer_dist.data import best_fit, packing
from roformer_dist.data.errors import DataError
from roformer_dist.data.files import sha256_json
from roformer_dist.data.packing import make_plan, make_plans
from roformer_dist.data.plan import PackOptions, Plan, load_plans, save_buckets
from roformer_dist.data.plan_check import verify_plan
from roformer_dist.data.units import units_of

GOLDEN_OPTIONS = {
    "best-fit": {"shards_per_group": 2},
    "unfilled": {"max_padding": 1.0, "seed": 1},
    "concat": {"method": "concat", "upsample": ((9, 1.5),)},
    "bucket": {"method": "bucket", "min_len": 4},
    "grouped": {"group_by_key": True, "document_mask": False},
}
GOLDEN = {
    "best-fit": "3f065b326bacec3b",
    "unfilled": "6e546798abfd163a",
    "concat": "84662706d12ccb37",
    "bucket": "cf83af35c2ea3e05",
    "grouped": "78084a1d36e868a8",
}


class Lengths:
    """A store of which only lengths exist, for packing; ``shards`` are how many documents each holds."""

    def __init__(self, lengths, groups=None, shards=None):
        self.lengths, self.root, self.path = np.array(lengths, dtype=np.int64), "root", "lengths"
        self.groups = np.array(groups or [0] * len(lengths), dtype=np.uint64)
        shards = [len(lengths)] if shards is None else shards
        self.manifest = SimpleNamespace(shards=[SimpleNamespace(documents=n) for n in shards])

    def __len__(self):
        return len(self.lengths)

    @property
    def num_tokens(self):
        return int(self.lengths.sum())


@st.composite
def packings(draw):
    """Any store and any options that make sense together."""
    lengths = draw(st.lists(st.integers(1, 70), min_size=1, max_size=40))
    groups = draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    cuts = sorted(draw(st.lists(st.integers(0, len(lengths)), max_size=4)))
    shards = np.diff([0, *cuts, len(lengths)]).tolist()
    method = draw(st.sampled_from(packing.METHODS))
    bucket = method == "bucket"
    options = {
        "method": method,
        "seed": draw(st.integers(0, 5)),
        "shards_per_group": draw(st.integers(1, 3)),
        "document_mask": bucket or draw(st.booleans()),
        "group_by_key": not bucket and draw(st.booleans()),
        "upsample": tuple(
            draw(
                st.dictionaries(st.integers(1, 80), st.sampled_from([1.0, 1.5, 2.0, 3.25]), max_size=2)
            ).items()
        ),
    }
    seq_len = 2 ** draw(st.integers(1, 5)) if bucket else draw(st.integers(2, 40))
    if bucket:
        options["min_len"] = 2 ** draw(st.integers(1, seq_len.bit_length() - 1))
    if method == "best-fit":
        options["max_padding"] = draw(st.sampled_from([0.0, 0.001, 0.05, 1.0]))
    return Lengths(lengths, groups, shards), seq_len, PackOptions(**options)


@given(packings())
@settings(max_examples=300)
def test_every_token_is_in_the_rows_as_often_as_it_must(packing_):
    store, seq_len, options = packing_
    plans = make_plans(store, seq_len, options)
    seen = [np.zeros(length, int) for length in store.lengths]
    for plan in plans:
        for row in range(plan.num_rows):
            pieces = plan.pieces(row)
            assert 1 <= plan.length[pieces].sum() <= plan.seq_len
            assert len(plan.length[pieces]) == 1 or options.method != "bucket"
            for document, start, length in zip(
                plan.document[pieces], plan.start[pieces], plan.length[pieces]
            ):
                seen[document][start : start + length] += 1
        assert plan.document_mask == options.document_mask
    copies = units_of(store, plans[0].options).document_copies()
    assert all((count == copy).all() for count, copy in zip(seen, copies))
    if not options.upsample:
        assert (copies == 1).all()
    targets = sum(int(plan.has_target(row).sum()) for plan in plans for row in range(plan.num_rows))
    assert targets == ((store.lengths - 1) * copies).sum()
    assert verify_plan(plans, store) is None
    again = make_plans(store, seq_len, options)
    assert [plan.hash for plan in again] == [plan.hash for plan in plans]


def test_best_fit_by_example():
    plan = make_plan(Lengths([25, 6, 4, 3, 5]), 10, max_padding=1.0)
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
    # The 3 goes where the least room is left, not beside the 5.
    plan = make_plan(Lengths([7, 5, 3]), 10, max_padding=1.0)
    assert {tuple(plan.document[plan.pieces(row)].tolist()) for row in range(2)} == {(0, 2), (1,)}


def test_best_fit_leaves_little_padding_and_scales():
    generator = np.random.default_rng(0)
    store = Lengths(np.minimum(generator.lognormal(7, 1.6, 50_000).astype(int) + 1, 10**6))
    plan = make_plan(store, 131_072)
    assert plan.padding < 0.001
    assert plan.num_tokens == store.num_tokens


def logged(count, mean=7.0):
    lengths = np.random.default_rng(0).lognormal(mean, 1.6, count).astype(int) + 1
    return Lengths(np.minimum(lengths, 10**6))


def test_filling_gives_up_the_emptiest_row_and_fills_the_largest_rooms():
    # Rooms of 1, 2 and 3, and a row of one item of 5: it is cut to fill 3 and 2, and the 1 stays.
    row, item, start, length = best_fit.best_fit(np.array([9, 8, 7, 5]), 10, max_padding=0.05)
    assert sorted(zip(row.tolist(), item.tolist(), start.tolist(), length.tolist())) == [
        (0, 0, 0, 9),
        (1, 1, 0, 8),
        (1, 3, 3, 2),
        (2, 2, 0, 7),
        (2, 3, 0, 3),
    ]


@pytest.mark.parametrize("seq_len", [512, 8192, 32_768, 131_072])
@pytest.mark.parametrize("count", [300, 30_000])
def test_padding_is_at_most_a_thousandth_or_one_row(seq_len, count):
    store = logged(count)
    plan = make_plan(store, seq_len)
    needed = -(-store.num_tokens // seq_len)
    assert plan.num_rows <= max(needed, store.num_tokens / (seq_len * 0.999))
    fewest = make_plan(store, seq_len, max_padding=0.0)
    assert fewest.num_rows == needed
    assert (plan.length == 0).sum() == 0


def test_rows_of_128k_have_a_thousandth_of_padding_in_ten_microseconds_a_document():
    """Lengths as those of the C files of docs/long_context_data.md: log-normal, 15,800 tokens on average."""
    generator = np.random.default_rng(12)
    for count in (3_618, 3 * 3_618, 30_000):
        lengths = np.exp(generator.normal(9.417, 0.666, count)).astype(np.int64) + 1
        seconds = []
        for _ in range(3):
            started = time.process_time()
            row, _, _, length = best_fit.best_fit(lengths, 131_072, max_padding=0.001)
            seconds.append(time.process_time() - started)
        assert min(seconds) / count <= 10e-6
        rows = int(row.max()) + 1
        assert length.sum() == lengths.sum()
        # No packing has fewer rows than their tokens fill; that is above 0.1 % only for less than 1,000 rows.
        fewest = -(-int(lengths.sum()) // 131_072)
        assert rows == fewest or 1 - lengths.sum() / (rows * 131_072) <= 0.001
        assert count == 3_618 or 1 - lengths.sum() / (rows * 131_072) <= 0.001


def test_few_documents_are_cut_that_fit_a_row():
    store = logged(3000, mean=8.5)
    short = store.lengths <= 8192

    def cut(**options):
        pieces = np.bincount(make_plan(store, 8192, **options).document, minlength=len(store))
        return int(((pieces > 1) & short).sum())

    assert cut(max_padding=1.0) == 0
    assert cut() < 0.2 * cut(method="concat")


def test_placing_takes_steps_by_distinct_sizes_not_by_items(monkeypatch):
    searches = []

    def counted(*args):
        searches.append(args)
        return bisect.bisect_left(*args)

    monkeypatch.setattr(best_fit, "bisect_left", counted)
    few = np.sort(np.random.default_rng(0).integers(1, 500, 200_000))[::-1]
    rows, count = best_fit.place(few, 512)
    assert len(rows) == 200_000
    assert np.bincount(rows, weights=few).max() <= 512
    assert np.array_equal(np.unique(rows), np.arange(count))
    assert len(searches) < 5 * 512


def test_shard_groups_are_seeded_even_and_hold_their_documents():
    store = Lengths([5] * 40, shards=[4] * 10)
    plan = make_plan(store, 10, shards_per_group=3)
    assert plan.num_groups == 4
    groups = [set(plan.document[plan.row_offsets[a] : plan.row_offsets[b]].tolist()) for a, b in
              zip(plan.group_offsets[:-1], plan.group_offsets[1:])]  # fmt: skip
    assert sorted(len(group) for group in groups) == [8, 8, 12, 12]
    assert set.union(*groups) == set(range(40))
    other = make_plan(store, 10, shards_per_group=3, seed=1)
    assert groups[0] != set(other.document[: other.row_offsets[other.group_offsets[1]]].tolist())


def test_a_group_of_documents_fills_a_row_in_order():
    store = Lengths([6, 3, 7, 2, 4, 5, 13], groups=[9, 0, 9, 8, 9, 8, 0])
    plan = make_plan(store, 20, group_by_key=True, document_mask=False, max_padding=1.0)
    rows = {tuple(plan.document[plan.pieces(row)].tolist()) for row in range(plan.num_rows)}
    assert rows == {(0, 2, 4, 1), (6, 3, 5)}  # those without a key are no group


def test_upsampling_is_exact_and_takes_the_largest_rule():
    store = Lengths([10] * 100 + [50] * 7 + [200] * 3)
    plan = make_plan(store, 64, upsample=((50, 1.5), (200, 3.0), (10, 1.25)))
    copies = np.bincount(plan.document[plan.ends_document], minlength=110)
    assert (copies[:100].sum(), copies[100:107].sum(), copies[107:].tolist()) == (125, 11, [3, 3, 3])
    assert verify_plan(plan, store) is None


def test_the_bytes_of_a_tiny_plan_do_not_drift():
    store = Lengths([25, 6, 40, 3, 5, 9, 17], groups=[0, 1, 1, 0, 2, 2, 0], shards=[3, 2, 2])
    packed = {
        name: sha256_json([array.tolist() for plan in make_plans(store, 16, PackOptions(**options)) for array in (
            plan.row_offsets, plan.document, plan.start, plan.length, plan.group_offsets)])[:16]
        for name, options in GOLDEN_OPTIONS.items()
    }  # fmt: skip
    assert packed == GOLDEN


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
    assert (loaded.seq_len, loaded.method, loaded.options) == (64, "best-fit", plan.options)
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
    for name in ("row_offsets", "document", "start", "length", "ends_document", "group_offsets"):
        other = arrays[name].copy()
        other[-1] ^= 1
        np.savez(path, **{**arrays, name: other})
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


def changed(array, index, by):
    array = array.copy()
    array[index] += by
    return array


TAMPERED = {
    "made for manifest root other": lambda p: {"manifest_root": "other"},
    "has a piece of tokens": lambda p: {"start": p.start + (p.start > 0)},
    "ends_document is wrong": lambda p: {"ends_document": ~p.ends_document},
    "its arrays of pieces differ": lambda p: {"start": p.start[:-1]},
    "row_offsets does not rise": lambda p: {"row_offsets": changed(p.row_offsets, 1, 9999)},
    "group_offsets does not rise": lambda p: {"group_offsets": changed(p.group_offsets, -1, 1)},
    "shard groups, its options give": lambda p: {"group_offsets": np.array([0, 0, p.num_rows])},
    "outside 0 to": lambda p: {"document": changed(p.document, 0, 10**6)},
    "more than 16": lambda p: {"seq_len": 16},
}


@pytest.mark.parametrize("problem", TAMPERED)
def test_verify_plan_finds_what_is_wrong(problem):
    plan, store = tiny().plan(), tiny().store
    assert verify_plan(plan, store) is None
    assert problem in str(verify_plan(replace(plan, **TAMPERED[problem](plan)), store))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"start": [-8, 0]}, "has a piece of tokens -8 to -1"),
        ({"length": [0, 8]}, "has a piece of tokens 0 to -1"),
        ({"row_offsets": [0, 0, 2]}, "row 0 holds nothing"),
    ],
)
def test_verify_plan_finds_pieces_and_rows_of_nothing(values, problem):
    plan = make_plan(Lengths([8, 8]), 8, seed=0)
    ends = plan.start + np.array(values.get("length", [8, 8])) == 8
    changed = replace(plan, ends_document=ends, **{name: np.array(array) for name, array in values.items()})
    assert problem in str(verify_plan(changed, Lengths([8, 8])))


def test_verify_plan_finds_twice_missing_and_foreign_pieces():
    store = Lengths([8, 8, 8, 8], shards=[1, 1, 1, 1])
    plan = make_plan(store, 8, method="concat", shards_per_group=2)
    assert verify_plan(plan, store) is None
    # The first document twice, the last not at all: the rows are of the right size, the counts are not.
    doubled = plan.document.copy()
    doubled[doubled == 3] = 0
    assert verify_plan(replace(plan, document=doubled), store) is not None
    one_group = make_plan(Lengths([8, 8]), 4, method="concat")
    start = one_group.start.copy()
    start[:] = 0
    twice = replace(one_group, start=start, ends_document=np.zeros(4, bool))
    assert "more or less often than 1 times" in str(verify_plan(twice, Lengths([8, 8])))
    thirds = make_plan(Lengths([12]), 4)
    at_4 = thirds.start == 4
    missing = replace(thirds, start=thirds.start + at_4, length=thirds.length - at_4)
    assert "more or less often than 1 times" in str(verify_plan(missing, Lengths([12])))
    swapped = replace(plan, document=plan.document[::-1].copy())
    assert "not its own" in str(verify_plan(swapped, store))
    upsampled = make_plan(store, 8, upsample=((8, 2.0),))
    assert verify_plan(upsampled, store) is None
    forgotten = replace(upsampled, options=replace(upsampled.options, upsample=()))
    assert "more or less often than 1 times" in str(verify_plan(forgotten, store))
    grouped = Lengths([2, 3, 2], groups=[7, 7, 7])
    rows = make_plan(grouped, 16, group_by_key=True)
    assert rows.document.tolist() == [0, 1, 2]
    order = [1, 0, 2]
    mixed = replace(
        rows, **{n: getattr(rows, n)[order] for n in ("document", "start", "length", "ends_document")}
    )
    assert "documents of a key" in str(verify_plan(mixed, grouped))


def test_verify_plan_of_buckets():
    store = Lengths([100, 7, 33])
    plans = make_plans(store, 32, PackOptions(method="bucket", min_len=4))
    assert [plan.seq_len for plan in plans] == [4, 32]
    assert verify_plan(plans, store) is None
    assert "more or less often" in str(verify_plan(plans[:1], store))
    assert "are not the buckets" in str(verify_plan([plans[0], replace(plans[1], seq_len=64)], store))
    assert "different options" in str(verify_plan([plans[0], make_plan(store, 32)], store))
    order = np.argsort(-plans[0].length)  # pieces of 4, 4, 3 and 1 tokens; the last two in one row
    arrays = {n: getattr(plans[0], n)[order] for n in ("document", "start", "length", "ends_document")}
    arrays |= {"row_offsets": np.array([0, 1, 2, 4]), "group_offsets": np.array([0, 3])}
    joined = replace(plans[0], **arrays)
    assert "rows of 4 tokens hold several pieces" in str(verify_plan([joined, plans[1]], store))


def test_a_changed_folder_of_buckets_is_found(tmp_path):
    folder = tmp_path / "buckets"
    save_buckets(make_plans(tiny().store, 64, PackOptions(method="bucket", min_len=32)), folder)
    assert [plan.seq_len for plan in load_plans(folder)] == [32, 64]
    make_plan(tiny().store, 32).save(folder / "len_000032.npz")
    with pytest.raises(DataError, match=r"len_000032\.npz: hash .*, buckets\.json says .*; pack it again"):
        load_plans(folder)
    record = json.loads((folder / "buckets.json").read_text())
    del record["plans"]["len_000032.npz"]
    (folder / "buckets.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"buckets\.json: its content does not match its hash; pack it again"):
        load_plans(folder)
    (folder / "buckets.json").write_text(json.dumps({**record, "version": 9}))
    with pytest.raises(
        DataError, match=r"buckets\.json: format .* version 9, this program reads .* version 2"
    ):
        load_plans(folder)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_plan(Lengths([3]), 1), "--seq-len 1"),
        (lambda: make_plan(Lengths([3]), 10**13), "--seq-len 10000000000000: .* at most 2147483647"),
        (lambda: make_plan(Lengths([3]), 10**20), "--seq-len 100000000000000000000: .* at most 2147483647"),
        (
            lambda: make_plan(Lengths([3]), 8, window=10**30),
            "--window 1000000000000000000000000000000: give at least 1 and at most",
        ),
        (lambda: make_plan(Lengths([3]), 8, upsample=((2**63, 2.0),)), "--upsample 9223372036854775808:2"),
        (lambda: make_plan(Lengths([3]), 8, method="fit"), "unknown; use best-fit, concat or bucket"),
        (lambda: make_plan(Lengths([]), 8), "nothing to pack"),
        (lambda: make_plan(Lengths([3]), 8, upsample=((5, 2.0), (5, 3.0))), "--upsample 5:2: .* given once"),
        (
            lambda: make_plan(Lengths([3]), 8, upsample=((5, 1001.0),)),
            "--upsample 5:1001: .* factor 1 to 1000",
        ),
        (lambda: make_plan(Lengths([3]), 8, max_padding=1.5), "--max-padding 1.5: give a fraction"),
        (lambda: make_plan(Lengths([3]), 8, method="concat", max_padding=0.1), "only best-fit has it"),
        (lambda: make_plan(Lengths([3]), 8, min_len=4), "--min-len 4: only buckets have it"),
        (lambda: make_plan(Lengths([3]), 24, method="bucket"), "--seq-len 24: .* powers of two"),
        (lambda: make_plan(Lengths([3]), 8, method="bucket", min_len=3), "--min-len 3: .* powers of two"),
        (
            lambda: make_plan(Lengths([3]), 8, method="bucket", min_len=16),
            "--min-len 16: longer than --seq-len 8",
        ),
        (
            lambda: make_plan(Lengths([3]), 8, method="bucket", document_mask=False),
            "--no-document-mask: does nothing with --method bucket",
        ),
        (
            lambda: make_plan(Lengths([3]), 8, method="bucket", group_by_key=True),
            "--group-by-key: does nothing with --method bucket",
        ),
    ],
)
def test_errors_are_one_line(call, message):
    with pytest.raises(DataError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
