"""A shards folder of any number of documents opens at once: its indexes are checked as far as they are read."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from test_data_tiny import tiny

from roformer_dist.data import store as store_module
from roformer_dist.data.errors import DataError
from roformer_dist.data.sources import LocalSource
from roformer_dist.data.store import ShardStore


@pytest.fixture
def opened(monkeypatch):
    """Names of the files beside the shards, as they are opened; every folder is a large one."""
    assert len(tiny().store)  # opened before it counts
    monkeypatch.setattr(store_module, "WHOLE_DOCUMENTS", 0)
    names, small = [], LocalSource.small

    def counted(self, name, sha256):
        names.append(name)
        return small(self, name, sha256)

    monkeypatch.setattr(LocalSource, "small", counted)
    return names


def test_opening_reads_no_index_and_reading_only_those_it_needs(opened):
    whole = tiny().store
    with ShardStore(tiny().root / "shards") as store:
        assert (len(store), opened) == (len(whole), [])
        last = len(store) - 1
        assert np.array_equal(store.read(last), whole.read(last))
        assert np.array_equal(store.read(last, 2, 3), whole.read(last, 2, 3))
        name = store.manifest.shards[-1].name.removesuffix(".tar")
        assert opened == [f"{name}.idx.npy", f"{name}.blocks.npy"]
        assert np.array_equal(store.lengths, whole.lengths)
        assert np.array_equal(store.groups, whole.groups)


@pytest.mark.parametrize("kind", ["idx", "blocks"])
def test_a_damaged_index_is_found_when_its_shard_is_read(opened, tmp_path, kind):
    shutil.copytree(tiny().root / "shards", tmp_path / "shards")
    path = tmp_path / f"shards/shard-000001.{kind}.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with ShardStore(tmp_path / "shards") as store:
        store.read(0)
        first = store.manifest.shards[0].documents
        with pytest.raises(DataError, match=rf"shard-000001\.{kind}\.npy: damaged"):
            store.read(first)
    with (
        pytest.raises(DataError, match=rf"shard-000001\.{kind}\.npy"),
        ShardStore(tmp_path / "shards") as store,
    ):
        _ = store.lengths


def test_no_more_indexes_are_kept_than_a_window_needs(opened, monkeypatch):
    monkeypatch.setattr(store_module, "_INDEXES", 1)
    monkeypatch.setattr(store_module, "_INDEX_MEMORY", 0)
    with ShardStore(tiny().root / "shards") as store:
        assert len(store.manifest.shards) > 1
        first = store.manifest.shards[0].documents
        for document in (0, first, 0):
            store.read(document)
    assert [name for name in opened if name.endswith(".idx.npy")] == [
        f"shard-{number:06d}.idx.npy" for number in (0, 1, 0)
    ]
