import errno
import io
import json
import os
import resource
import shutil
import sqlite3
import string
import tarfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from test_data_tiny import tiny, tiny_texts

from roformer_dist.data.errors import DataError
from roformer_dist.data.files import atomic_file, atomic_folder, check_file_out, check_folder_out, writing
from roformer_dist.data.inputs import find_inputs
from roformer_dist.data.shard_writer import ShardWriter
from roformer_dist.data.shards import write_shards
from roformer_dist.data.store import ShardStore, documents
from roformer_dist.data.tar import tar_header
from roformer_dist.data.verify import verify_shards


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(tiny().root / "shards", tmp_path / "shards")


def problems(folder):
    return [problem for _, problem in verify_shards(folder) if problem]


def test_store_gives_every_document_back():
    store, tokenizer = tiny().store, tiny().tokenizer
    assert [len(ids) for ids in documents(store)] == store.lengths.tolist()
    texts = [tokenizer.decode(ids) for ids in documents(store)]
    assert texts == [tiny_texts()[file.name] for file in tiny().files]
    assert all(ids[-1] == tokenizer.eos_id for ids in documents(store))
    assert store.num_tokens == store.lengths.sum()


def test_webdataset_reads_the_shards():
    store = tiny().store
    urls = [str(store.path / shard.name) for shard in store.manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{i:012d}" for i in range(len(store))]
    for document, sample in enumerate(samples):
        assert np.array_equal(np.frombuffer(sample["tokens.bin"], "<u2"), store.read(document))
        assert json.loads(sample["json"])["source"] == tiny().files[document].name


@given(
    st.text(string.ascii_letters + string.digits + "._-/", min_size=1, max_size=100),
    st.integers(0, 8**11 - 1),
)
def test_a_header_is_that_of_tarfile(name, size):
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.uname, member.gname = size, 0o444, "bigdata", "bigdata"
    assert tar_header(name, size) == member.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 40])
def test_a_shard_has_the_bytes_that_webdataset_writes(tmp_path, count):
    writer, expected = ShardWriter(tmp_path, 0, 2), io.BytesIO()
    tar = webdataset.TarWriter(expected, encoder=False, mtime=0)
    for number in range(count):
        # Empty, whole blocks, and one byte more or less.
        key, data, meta = (
            f"{number:012d}",
            bytes([number]) * (0, 2, 510, 512, 514, 9000)[number % 6],
            {"line": number},
        )
        writer.add(key, data, meta, 0)
        tar.write({"__key__": key, "json": json.dumps(meta).encode(), "tokens.bin": data})
    tar.close()
    shard = writer.close()
    written = (tmp_path / shard.name).read_bytes()
    assert written == expected.getvalue()
    assert len(written) % 10_240 == 0
    with tarfile.open(tmp_path / shard.name) as found:
        assert [member.name for member in found] == [
            f"{number:012d}.{end}" for number in range(count) for end in ("json", "tokens.bin")
        ]


def test_a_member_too_large_for_a_tar_is_one_line():
    with pytest.raises(DataError, match=r"x\.tokens\.bin: 8589934592 bytes, .* split the document"):
        tar_header("x.tokens.bin", 8**11)


def test_writing_is_deterministic_and_a_rerun_reuses(tmp_path):
    again = tmp_path / "again"
    assert not write_shards(tiny().files, tiny().tokenizer, again, shard_bytes=4096).reused
    for path in sorted((tiny().root / "shards").iterdir()):
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
    before = (again / "shard-000000.tar").stat().st_mtime_ns
    assert write_shards(tiny().files, tiny().tokenizer, again, shard_bytes=4096).reused
    assert (again / "shard-000000.tar").stat().st_mtime_ns == before


def test_a_folder_of_other_inputs_is_refused_and_named(copy, tmp_path):
    with pytest.raises(DataError, match=r"bytes \d+, but this run has \d+.*another --out"):
        write_shards(tiny().files[:-1], tiny().tokenizer, copy, shard_bytes=4096)
    with pytest.raises(DataError, match="shard_bytes 4096, but this run has 8192"):
        write_shards(tiny().files, tiny().tokenizer, copy, shard_bytes=8192)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("text")
    write_shards(find_inputs([str(tmp_path / "one")]), tiny().tokenizer, tmp_path / "of one")
    (tmp_path / "one" / "a.txt").rename(tmp_path / "one" / "b.txt")  # the names are in the shards
    with pytest.raises(DataError, match=r"has sha256 .*, but this run has"):
        write_shards(find_inputs([str(tmp_path / "one")]), tiny().tokenizer, tmp_path / "of one")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.tar").write_bytes(b"precious")
    with pytest.raises(DataError, match="not an empty folder"):
        write_shards(tiny().files, tiny().tokenizer, tmp_path / "full")
    assert (tmp_path / "full" / "mine.tar").read_bytes() == b"precious"


def test_a_flipped_bit_is_found_by_reading_and_by_verify(copy):
    shard = copy / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    document = int(np.load(copy / "shard-000000.idx.npy").shape[0])
    offset = int(np.load(copy / "shard-000001.idx.npy")["offset"][0])
    data[offset + 1] ^= 4
    shard.write_bytes(data)
    store = ShardStore(copy)
    with pytest.raises(DataError, match=rf"shard-000001.tar: document {document:012d} is damaged"):
        store.read(document)
    assert store.read(document + 1).size
    found = problems(copy)
    assert len(found) == 2
    assert "shard-000001.tar: sha256" in found[0]
    assert f"document {document:012d} fails its crc32" in found[1]
    with pytest.raises(DataError, match=r"shard-000001.tar: sha256"):
        write_shards(tiny().files, tiny().tokenizer, copy, shard_bytes=4096)


def test_block_checksums_cover_every_byte_of_every_document(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "long.txt").write_text(
        "1234567" * 1_800
    )  # one digit, one token: three blocks and a bit
    (tmp_path / "text" / "short.txt").write_text("a")
    write_shards(find_inputs([str(tmp_path / "text")]), tiny().tokenizer, tmp_path / "out")
    index = np.load(tmp_path / "out" / "shard-000000.idx.npy")
    tar = (tmp_path / "out" / "shard-000000.tar").read_bytes()
    expected = []
    for record in index:
        begin, size = int(record["offset"]), int(record["bytes"])
        payload = tar[begin : begin + size]
        expected += [zlib.crc32(payload[at : at + 8_192]) for at in range(0, size, 8_192)]
    blocks = np.load(tmp_path / "out" / "shard-000000.blocks.npy")
    assert blocks.dtype == np.dtype("<u4")
    assert blocks.tolist() == expected
    assert len(expected) == 5
    tokens = ShardStore(tmp_path / "out").read(0)
    for block in range(4):
        at = int(index["offset"][0]) + 8_192 * block + 5
        (tmp_path / "out" / "shard-000000.tar").write_bytes(tar[:at] + bytes([tar[at] ^ 1]) + tar[at + 1 :])
        store = ShardStore(tmp_path / "out")
        for other in range(4):
            if other == block:
                with pytest.raises(DataError, match=f"is damaged .*, {8_192 * other} bytes into it"):
                    store.read(0, 4_096 * other, 7)
            else:
                assert np.array_equal(store.read(0, 4_096 * other, 7), tokens[4_096 * other :][:7])
        with pytest.raises(DataError, match="is damaged"):
            store.read(0)
    (tmp_path / "out" / "shard-000000.tar").write_bytes(tar)
    (tmp_path / "out" / "shard-000000.blocks.npy").write_bytes(b"other")
    with pytest.raises(DataError, match=r"blocks\.npy: damaged"):
        ShardStore(tmp_path / "out")
    assert "blocks.npy: sha256" in problems(tmp_path / "out")[0]


def test_truncation_and_a_missing_shard_are_found(copy):
    shard = copy / "shard-000001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    with pytest.raises(DataError, match=rf"shard-000001.tar: {len(data) - 512} bytes, manifest.json says"):
        ShardStore(copy)
    assert f"{len(data) - 512} bytes, expected {len(data)}" in problems(copy)[0]
    shard.unlink()
    with pytest.raises(DataError, match="missing"):
        ShardStore(copy)
    assert problems(copy) == [f"{shard}: missing"]


def test_swapped_shards_are_found(copy):
    first, second = copy / "shard-000000.tar", copy / "shard-000001.tar"
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b), second.write_bytes(a)
    found = problems(copy)
    assert any("shard-000000.tar" in problem for problem in found)
    assert any("shard-000001.tar" in problem for problem in found)


def test_a_changed_index_manifest_or_tokenizer_is_found(copy):
    index = copy / "shard-000000.idx.npy"
    good = index.read_bytes()
    index.write_bytes(good[:-1] + b"\x01")
    with pytest.raises(DataError, match=r"idx\.npy: damaged"):
        ShardStore(copy)
    assert "shard-000000.idx.npy: sha256" in problems(copy)[0]
    index.write_bytes(good)
    (copy / "tokenizer.model").write_bytes(b"other")
    assert "tokenizer.model" in problems(copy)[0]
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"eos_id": 2', '"eos_id": 3'))
    with pytest.raises(DataError, match="does not match its root"):
        ShardStore(copy)
    assert "does not match its root" in problems(copy)[0]


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path, monkeypatch):
    tokenizer = tiny().tokenizer
    monkeypatch.setattr(tokenizer, "vocab_size", 2**16 + 1)
    write_shards(tiny().files[:3], tokenizer, tmp_path / "wide")
    store = ShardStore(tmp_path / "wide")
    assert store.manifest.dtype == "uint32"
    assert np.array_equal(store.read(2), tiny().store.read(2))


def test_all_is_on_disk_before_the_folder_appears(tmp_path, monkeypatch):
    synced, rename, fsync, replace = [], os.rename, os.fsync, os.replace

    def note(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def finish(source, target):
        if Path(target).name == "shard-000000.json":  # says that the shard is there, so its name is before it
            assert synced.index("shards") > synced.index("shard-000000.tar")
        replace(source, target)

    def publish(source, target):
        written = {path.name for path in Path(source).iterdir()}
        assert {"manifest.json", "tokenizer.model", "shard-000000.tar"} < written
        # A file that is renamed into place was synced under its hidden name.
        assert all(name in synced or any(s.startswith(f".{name}.") for s in synced) for name in written)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", publish)
    monkeypatch.setattr(os, "replace", finish)
    write_shards(tiny().files[:3], tiny().tokenizer, tmp_path / "out")
    assert (tmp_path / "out").is_dir()
    assert synced[-1] == tmp_path.name  # the folder's own name


@contextmanager
def files_of_at_most(size):
    """As ulimit -f does it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_files_that_may_not_grow_are_one_line_and_the_build_goes_on(tmp_path):
    out, options = tmp_path / "out", {"shard_bytes": 4096, "deduplicate": True}
    expected = write_shards(tiny().files, tiny().tokenizer, tmp_path / "whole", **options).manifest
    largest = max(shard.bytes for shard in expected.shards)
    with files_of_at_most(largest - 1), pytest.raises(DataError) as caught:
        write_shards(tiny().files, tiny().tokenizer, out, **options)
    message = f"{out}: cannot be written (File too large); raise the limit on the size of a file (ulimit -f); the same"
    assert str(caught.value).startswith(message)
    assert write_shards(tiny().files, tiny().tokenizer, out, **options).manifest == expected
    with (
        files_of_at_most(100),
        pytest.raises(DataError, match=r"plan\.npz: cannot be written \(File too large\)"),
    ):
        tiny().plan().save(tmp_path / "plan.npz")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), sqlite3.OperationalError("full")]
)
def test_a_full_disk_is_one_line(tmp_path, error):
    with (
        pytest.raises(
            DataError, match=r"out: cannot be written \(.*\); free space there or choose another --out"
        ),
        writing(tmp_path / "out"),
    ):
        raise error
    other = PermissionError(errno.EACCES, "not allowed", "x")
    with pytest.raises(PermissionError), writing(tmp_path / "out"):
        raise other


@pytest.mark.parametrize("check", [check_folder_out, lambda out: check_file_out(out, "plan.npz")])
def test_a_place_that_may_not_be_written_is_one_line(tmp_path, monkeypatch, check):
    (tmp_path / "shut").mkdir()
    # root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "shut")
    check(tmp_path / "open")
    with pytest.raises(
        DataError, match=r"^--out .*/shut/a/out: nothing can be written in .*/shut \(.*another --out$"
    ):
        check(tmp_path / "shut/a/out")


def fail_in_file(path):
    with atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError


def fail_in_folder(path):
    with atomic_folder(path) as partial:
        (partial / "half").write_bytes(b"half")
        raise RuntimeError


def test_a_failed_write_keeps_the_file_that_was_there(tmp_path):
    for content in (b"first", b"second"):
        with atomic_file(tmp_path / "file") as file:
            file.write(content)
    with pytest.raises(RuntimeError):
        fail_in_file(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"second"


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(DataError):
        write_shards([*tiny().files[:2], *find_inputs([str(tmp_path)])], tiny().tokenizer, tmp_path / "out")
    for attempt in (fail_in_file, fail_in_folder):
        with pytest.raises(RuntimeError):
            attempt(tmp_path / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]
