"""A plan of any number of rows opens at once: it is mapped, and checked as far as it is read."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_data_tiny import tiny

from roformer_dist.data import plan as plan_module
from roformer_dist.data.errors import DataError
from roformer_dist.data.loader import Loader
from roformer_dist.data.objective import CausalObjective
from roformer_dist.data.packing import make_plan
from roformer_dist.data.plan import PackOptions, Plan, load_plans
from roformer_dist.data.plan_chunks import chunk_rows
from roformer_dist.data.rows import read_row
from roformer_dist.data.stages import Source, Stage
from roformer_dist.data.store import ShardStore

OPEN = """
import sys, time, json
import numpy as np
from roformer_dist.data.objective import CausalObjective
from roformer_dist.data.order import RowOrder
from roformer_dist.data import plan
from roformer_dist.data.plan import Plan
plan.MAPPED_BYTES = 0
def read():
    return int(open("/proc/self/io").read().split()[1])
before, start, cpu = read(), time.perf_counter(), time.process_time()
plan = Plan.load(sys.argv[1])
opened, seconds = read() - before, time.perf_counter() - start
order = RowOrder(plan.group_offsets, plan.window, seed=0, source=int(plan.hash[:16], 16))
rows = order.rows(np.arange(10**9, 10**9 + 512))
valid = CausalObjective().count_valid(plan, rows, rows, 0)
print(json.dumps({"opened": opened, "open_cpu": seconds, "cpu": time.process_time() - cpu, "valid": valid,
                  "wall": time.perf_counter() - start}))
"""


def synthetic(rows: int, groups: int = 64) -> Plan:
    """One piece of 7 tokens, that ends its document, in each row of 8."""
    documents = np.arange(rows)
    return Plan(
        seq_len=8,
        manifest_root="0" * 64,
        options=PackOptions(),
        row_offsets=np.arange(rows + 1),
        document=documents,
        start=np.zeros(rows, np.int64),
        length=np.full(rows, 7),
        ends_document=np.ones(rows, bool),
        group_offsets=np.linspace(0, rows, groups + 1).astype(np.int64),
    )


def opened(path: Path) -> dict[str, float]:
    """Figures of a fresh process that opens a plan and counts the targets of a step of 512 rows."""
    done = subprocess.run([sys.executable, "-c", OPEN, path], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture
def mapped(monkeypatch):
    """Plans of any size are mapped."""
    monkeypatch.setattr(plan_module, "MAPPED_BYTES", 0)


def test_what_opening_reads_does_not_grow_with_the_rows(tmp_path):
    read = []
    for rows in (50_000, 500_000):
        synthetic(rows).save(tmp_path / "plan.npz")
        read.append(opened(tmp_path / "plan.npz"))
        assert read[-1]["valid"] == 512 * 6
    # The table of chunks is 32 bytes for a thousand rows, and at most half a megabyte.
    assert read[1]["opened"] - read[0]["opened"] < 32 * 450_000 / 1024 + 10_000
    assert read[1]["opened"] < 100_000 < (tmp_path / "plan.npz").stat().st_size / 100
    assert -(-(10**8) // chunk_rows(10**8)) * 32 <= 2**19


@pytest.mark.slow
def test_a_plan_of_100_million_rows_opens_in_two_seconds(tmp_path):
    synthetic(10**8).save(tmp_path / "plan.npz")
    figures = opened(tmp_path / "plan.npz")
    assert figures["valid"] == 512 * 6
    assert figures["opened"] < 1_000_000
    assert figures["cpu"] < 2, figures


def test_a_mapped_plan_gives_the_same_rows_and_hash(tmp_path, mapped):
    plan, store = tiny().plan(), tiny().store
    plan.save(tmp_path / "plan.npz")
    found = Plan.load(tmp_path / "plan.npz")
    assert isinstance(found.document.base, np.memmap)
    assert found.hash == plan.hash == Plan.load(tmp_path / "plan.npz", whole=True).hash
    for row in range(plan.num_rows):
        assert read_row(store, found, row).tokens.tolist() == read_row(store, plan, row).tokens.tolist()


@pytest.mark.parametrize(
    ("save", "left_out"),
    [(np.savez, "chunks"), (np.savez_compressed, "chunks"), (np.savez_compressed, "")],
    ids=["without chunks", "both", "compressed"],
)
def test_a_plan_written_compressed_or_without_chunks_is_read_whole(tmp_path, mapped, save, left_out):
    plan = tiny().plan()
    plan.save(tmp_path / "plan.npz")
    with np.load(tmp_path / "plan.npz") as file:
        arrays = {name: file[name] for name in file.files if name != left_out}
    save(tmp_path / "old.npz", **arrays)
    assert Plan.load(tmp_path / "old.npz").hash == plan.hash
    arrays["start"] = arrays["start"] + 1
    save(tmp_path / "old.npz", **arrays)
    with pytest.raises(DataError, match=r"old.npz: hash .*, recorded .*; pack it again"):
        Plan.load(tmp_path / "old.npz")


def test_damage_is_found_before_a_row_of_it_is_read_and_by_verify_at_once(tmp_path, mapped):
    """Every byte of every array, in a plan of three chunks."""
    rows = 3000
    synthetic(rows).save(tmp_path / "plan.npz")
    data = (tmp_path / "plan.npz").read_bytes()
    generator = np.random.default_rng(3)
    for name in ("row_offsets", "document", "start", "length", "ends_document"):
        with zipfile.ZipFile(tmp_path / "plan.npz") as archive:
            begin = archive.getinfo(f"{name}.npy").header_offset
            size = archive.getinfo(f"{name}.npy").file_size
        for place in generator.integers(begin, begin + size, 20).tolist():
            changed = bytearray(data)
            changed[place] ^= 1 << int(generator.integers(8))
            (tmp_path / "bad.npz").write_bytes(changed)
            with pytest.raises(DataError, match=r"bad\.npz: "):
                Plan.load(tmp_path / "bad.npz", whole=True)
            complaint = found = None
            try:
                plan = Plan.load(tmp_path / "bad.npz")
                found = [plan.pieces(row) for row in range(rows)]
            except DataError as error:
                complaint = str(error)
            if complaint:
                assert "bad.npz: " in complaint
                assert "\n" not in complaint
            else:  # a byte of a name or of padding
                assert found == [slice(row, row + 1) for row in range(rows)]
                assert (plan.document == np.arange(rows)).all()
                assert (plan.start == 0).all()
                assert (plan.length == 7).all()
                assert plan.ends_document.all()


def test_only_the_chunks_that_are_read_are_checked_and_the_message_names_the_rows(tmp_path, mapped):
    synthetic(3000).save(tmp_path / "plan.npz")
    data = bytearray((tmp_path / "plan.npz").read_bytes())
    with zipfile.ZipFile(tmp_path / "plan.npz") as archive:
        member = archive.getinfo("start.npy")
    data[member.header_offset + member.file_size - 8 * 1500] ^= 1  # of row 1,500 or near it
    (tmp_path / "plan.npz").write_bytes(data)
    (plan,) = load_plans(tmp_path / "plan.npz")
    assert plan.pieces(1023) == slice(1023, 1024)
    plan.check_rows(np.array([[0, 2048], [2999, 5]]))
    with pytest.raises(DataError, match=r"plan\.npz: rows 1024 to 2047 are damaged; restore it or pack it"):
        plan.check_rows(np.array([0, 1024]))


def test_a_table_of_chunks_of_other_rows_is_refused(tmp_path, mapped):
    synthetic(3000).save(tmp_path / "plan.npz")
    with np.load(tmp_path / "plan.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "plan.npz", **{**arrays, "chunks": arrays["chunks"][:2]})
    with pytest.raises(DataError, match=r"plan\.npz: chunks is uint8 \(2, 32\) for 3000 rows; pack it again"):
        Plan.load(tmp_path / "plan.npz")


def test_training_stops_at_a_damaged_chunk(tmp_path, mapped):
    store: ShardStore = tiny().store
    make_plan(store, 64).save(tmp_path / "plan.npz")
    data = bytearray((tmp_path / "plan.npz").read_bytes())
    with zipfile.ZipFile(tmp_path / "plan.npz") as archive:
        member = archive.getinfo("document.npy")
    data[member.header_offset + member.file_size] ^= 1
    (tmp_path / "plan.npz").write_bytes(data)
    (plan,) = load_plans(tmp_path / "plan.npz")
    loader = Loader(
        [Stage((Source(store, (plan,)),))],
        seed=0,
        seq_len=64,
        global_batch=4,
        micro_batch_size=4,
        dp_rank=0,
        dp_size=1,
        objective=CausalObjective(),
    )
    with pytest.raises(DataError, match=r"plan\.npz: rows 0 to .* are damaged"):
        next(loader)
