"""Every kind of damage to a shards folder and its plan is found before a wrong token is delivered."""

import bisect
import io
import itertools
import random
import shutil
import struct
import tarfile
import tomllib
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from config_example import BASE
from test_data_tiny import tiny

from roformer_dist.config.load import parse_config
from roformer_dist.data.diagnosis import damaged_documents
from roformer_dist.data.errors import DamagedDocument, DataError
from roformer_dist.data.files import json_bytes, sha256_file, sha256_json
from roformer_dist.data.inputs import find_inputs
from roformer_dist.data.loader import DamageFound, Loader
from roformer_dist.data.manifest import Manifest
from roformer_dist.data.objective import CausalObjective
from roformer_dist.data.plan import Plan, load_plans
from roformer_dist.data.plan_check import verify_plan
from roformer_dist.data.rows import read_row
from roformer_dist.data.shard_writer import ShardWriter, group_hash
from roformer_dist.data.shards import write_shards
from roformer_dist.data.stages import Source, Stage
from roformer_dist.data.store import ShardStore
from roformer_dist.data.tokenizer import Tokenizer
from roformer_dist.data.verify import verify_shards
from roformer_dist.engine.datasets import Opened

FLIPS = 1000


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(tiny().root / "shards", tmp_path / "shards")
    tiny().plan().save(tmp_path / "plan.npz")
    return tmp_path


def deliver(folder):
    """Every row and the tokenizer's path, as a training opens them."""
    (plan,) = load_plans(folder / "plan.npz")
    with ShardStore(folder / "shards") as store:
        plan.check_store(store)
        Tokenizer(store.tokenizer_path)
        rows = [read_row(store, plan, row) for row in range(plan.num_rows)]
    return [(row.tokens.tobytes(), row.next_tokens.tobytes(), tuple(row.lengths)) for row in rows]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    shutil.copytree(tiny().root / "shards", folder / "shards")
    tiny().plan().save(folder / "plan.npz")
    return deliver(folder)


def problems(folder):
    return [problem for _, problem in verify_shards(folder / "shards") if problem]


def change(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def first_document(folder, shard=1):
    """Number, offset and size of the first document of a shard."""
    index = np.load(folder / f"shards/shard-{shard:06d}.idx.npy")
    number = sum(len(np.load(folder / f"shards/shard-{before:06d}.idx.npy")) for before in range(shard))
    return number, int(index["offset"][0]), int(index["bytes"][0])


def test_a_payload_bit_flip_names_shard_and_key(folder):
    number, offset, size = first_document(folder)
    path = folder / "shards/shard-000001.tar"
    change(path, offset + size - 1, bytes([path.read_bytes()[offset + size - 1] ^ 1]))
    with pytest.raises(
        DamagedDocument, match=rf"shard-000001\.tar: document {number:012d} is damaged"
    ) as caught:
        deliver(folder)
    assert (caught.value.document, caught.value.key) == (number, f"{number:012d}")
    assert caught.value.shard == str(path)
    assert any(f"{number:012d}" in problem for problem in problems(folder))


def test_truncation_at_a_member_boundary(folder):
    path = folder / "shards/shard-000001.tar"
    with tarfile.open(path) as tar:
        boundary = tar.getmembers()[-2].offset  # before the last document: what is left is a sound tar
    with open(path, "r+b") as file:
        file.truncate(boundary)
    with pytest.raises(DataError, match=rf"shard-000001\.tar: {boundary} bytes, manifest\.json says"):
        deliver(folder)
    assert f"{boundary} bytes, expected" in problems(folder)[0]


def test_a_cut_off_tar_is_opened_where_its_documents_are_to_be_left_out(folder):
    number, offset, _ = first_document(folder)
    with open(folder / "shards/shard-000001.tar", "r+b") as file:
        file.truncate(offset + 1)
    values = tomllib.loads(BASE.replace("vocab_size = 64", "vocab_size = 400"))
    values["data"]["tokenizer"] = str(folder / "shards/tokenizer.model")
    for choice in ("raise", "quarantine"):
        values["data"]["on_corrupt"] = choice
        opened = Opened(parse_config(values, source="test"))
        if choice == "raise":
            with pytest.raises(
                DataError, match=rf"shard-000001\.tar: {offset + 1} bytes, manifest\.json says"
            ):
                opened.store(str(folder / "shards"))
            continue
        store = opened.store(str(folder / "shards"))
        assert np.array_equal(store.read(number - 1), tiny().store.read(number - 1))
        with pytest.raises(DamagedDocument, match=rf"document {number:012d} is damaged \(1 of"):
            store.read(number)
        with (
            Loader(
                [Stage((Source(store, (tiny().plan(),)),))],
                seed=5,
                seq_len=64,
                global_batch=4,
                micro_batch_size=4,
                dp_rank=0,
                dp_size=1,
                objective=CausalObjective(),
            ) as loader,
            pytest.raises(DamageFound) as found,
        ):
            list(itertools.islice(loader, tiny().plan().num_rows))
        assert all(document >= number for _, document in found.value.damage)
    (folder / "shards/shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar: missing"):
        ShardStore(folder / "shards", check_sizes=False)


def test_truncation_while_the_store_is_open(folder):
    number, offset, _ = first_document(folder)
    with ShardStore(folder / "shards") as store:
        store.read(number)
        with open(folder / "shards/shard-000001.tar", "r+b") as file:
            file.truncate(offset)
        with pytest.raises(DamagedDocument, match="0 of"):
            store.read(number)


def lose(path):
    """Put a file there that fails when it is read (EIO), as where a disk has lost a sector."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


def test_a_disk_that_has_lost_a_sector_is_damage_of_the_document(folder):
    number, _, _ = first_document(folder)
    lose(folder / "shards/shard-000001.tar")
    with (
        ShardStore(folder / "shards", check_sizes=False) as store,
        pytest.raises(DamagedDocument, match=rf"document {number:012d} is damaged \(Input/output error, "),
    ):
        store.read(number)
    keys = [key for key, _ in damaged_documents(folder / "shards/shard-000001.tar", number, 1, None, None)]
    assert keys == [f"{number:012d}"]


def test_verify_goes_on_after_what_cannot_be_read(folder):
    lose(folder / "shards/shard-000000.blocks.npy")
    change(folder / "shards/shard-000001.idx.npy", 200, b"!!")
    first, second = problems(folder)
    assert first == f"{folder}/shards/shard-000000.blocks.npy: cannot be read (Input/output error)"
    assert second.startswith(f"{folder}/shards/shard-000001.idx.npy: sha256 ")


@pytest.mark.parametrize("where", [0, 124, 148], ids=["name", "size", "checksum"])
@pytest.mark.parametrize("member", [0, 1], ids=["json", "tokens"])
def test_a_damaged_tar_header_changes_no_token_and_is_found_by_verify(folder, original, member, where):
    number, _, _ = first_document(folder)
    path = folder / "shards/shard-000001.tar"
    with tarfile.open(path) as tar:
        header = tar.getmembers()[member].offset
    change(path, header + where, b"9")
    assert deliver(folder) == original
    found = problems(folder)
    assert "shard-000001.tar: sha256" in found[0]
    assert found[1].endswith(f"shard-000001.tar: document {number:012d} has a damaged tar header")
    assert len(found) == 2


@pytest.mark.parametrize("beside", ["whole", "index", "index and blocks"])
def test_verify_names_the_key_of_any_flip_in_a_tar(folder, beside):
    path = folder / "shards/shard-000001.tar"
    first, _, _ = first_document(folder)
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    starts = [member.offset for member in members[::2]]
    texts = [range(m.offset_data, m.offset_data + m.size) for m in members[::2]]
    damaged = {"whole": [], "index": ["idx"], "index and blocks": ["idx", "blocks"]}[beside]
    for name in damaged:
        change(folder / f"shards/shard-000001.{name}.npy", 200, b"damaged!")
    tokens = [range(m.offset_data, m.offset_data + m.size) for m in members[1::2]]
    data, generator, unnamed = path.read_bytes(), random.Random(4), 0
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    flips = [(generator.randrange(end), generator.randrange(8)) for _ in range(150)]
    # Sizes that are another octal number, or none, in headers of both kinds.
    flips += [(m.offset + at, bit) for m in members[4:6] for at in (131, 134) for bit in (0, 3, 6)]
    for at, bit in flips:
        change(path, at, bytes([data[at] ^ 1 << bit]))
        found = [problem for problem in problems(folder) if "shard-000001.tar: document" in problem]
        number = bisect.bisect_right(starts, at) - 1
        if found:
            assert f"document {first + number:012d} " in found[0]
            assert len(found) == 1
        else:
            unnamed += 1
            # A letter of a name in JSON is covered by the tar's hash alone; so are tokens without any checksum.
            assert at in texts[number] or (len(damaged) == 2 and at in tokens[number])
        change(path, at, data[at : at + 1])
    assert unnamed < (100 if len(damaged) == 2 else 15)


def test_verify_names_the_key_of_a_damaged_json_member(tmp_path):
    writer = ShardWriter(tmp_path, 0, 2)
    group = "g" * 5000
    for number in range(3):
        meta = {"source": "a", "line" if number else "row": 7, "group": group}
        writer.add(f"{number:012d}", b"tokens", meta, group_hash(group))
    writer.close()
    path, index = tmp_path / "shard-000000.tar", np.load(tmp_path / "shard-000000.idx.npy")
    with tarfile.open(path) as tar:
        member = tar.getmembers()[2]
    text = path.read_bytes()[member.offset_data :][: member.size]
    for damaged in (
        text.replace(b"{", b"z"),
        text.replace(b"source", b"sourcf"),
        text.replace(b"7", b" "),
        text.replace(b'": ', b'":\t'),
        text.replace(b"ggg", b"ggh", 1),
        b"7" * 4000 + b" " * (len(text) - 4000),
        b"[" * len(text),
    ):
        change(path, member.offset_data, damaged)
        assert [*damaged_documents(path, 0, 3, index, None)] == [
            ("000000000001", "has a damaged JSON member")
        ]
    change(path, member.offset_data, text)
    assert [*damaged_documents(path, 0, 3, index, None)] == []


def test_verify_names_the_end_of_a_tar_and_what_cannot_be_named(folder):
    path = folder / "shards/shard-000001.tar"
    data = path.read_bytes()
    change(path, len(data) - 1, b"x")
    assert problems(folder)[1].endswith("shard-000001.tar: the end of the tar is damaged")
    path.write_bytes(data.replace(b".txt", b".txu", 1))
    assert problems(folder)[1].endswith(
        "in the words of a JSON member, which nothing but the tar's sha256 covers"
    )
    change(folder / "shards/shard-000001.idx.npy", 200, b"damaged!")
    assert problems(folder)[2].endswith("with what is left of its index, no key can be named")


def test_a_shard_that_the_manifest_does_not_list_is_a_problem(folder):
    shutil.copy(folder / "shards/shard-000000.tar", folder / "shards/shard-000099.tar")
    (found,) = problems(folder)
    assert "shard-000099.tar: manifest.json does not list it" in found


def test_a_zeroed_hole(folder):
    number, offset, size = first_document(folder)
    change(folder / "shards/shard-000001.tar", offset, bytes(size))
    with pytest.raises(DamagedDocument, match=f"document {number:012d}"):
        deliver(folder)
    assert any(f"{number:012d} fails its crc32" in problem for problem in problems(folder))


def test_swapped_shards_of_equal_size(tmp_path):
    generator = random.Random(2)
    (tmp_path / "text").mkdir()
    for number in range(4):  # a digit is a token
        (tmp_path / f"text/{number}.txt").write_text("".join(generator.choices("0123456789", k=3000)))
    write_shards(
        find_inputs([str(tmp_path / "text")]), tiny().tokenizer, tmp_path / "shards", shard_bytes=4096
    )
    first, second = (tmp_path / f"shards/shard-{number:06d}.tar" for number in (0, 1))
    a, b = first.read_bytes(), second.read_bytes()
    assert len(a) == len(b)
    assert a != b
    first.write_bytes(b), second.write_bytes(a)
    with ShardStore(tmp_path / "shards") as store:
        for document in range(4):
            if store.shard_of(np.array([document]))[0] < 2:
                with pytest.raises(DamagedDocument):
                    store.read(document)
    found = problems(tmp_path)
    assert any("shard-000000.tar: sha256" in problem for problem in found)
    assert any("shard-000001.tar: sha256" in problem for problem in found)


@pytest.mark.parametrize("name", ["shard-000000.idx.npy", "shard-000000.blocks.npy", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone", "zero"])
def test_a_damaged_file_beside_the_shards(folder, name, damage):
    path = folder / "shards" / name
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    if damage == "gone":
        path.unlink()
    else:
        data[middle] ^= 16
        path.write_bytes({"flip": data, "cut": data[:middle], "empty": b"", "zero": bytes(len(data))}[damage])
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        deliver(folder)
    if damage != "gone" or name != "manifest.json":
        assert name in problems(folder)[0]


def test_a_manifest_with_a_right_root_and_wrong_fields(folder):
    fields = Manifest.load(folder / "shards").to_dict()
    del fields["root"], fields["tokens"]
    (folder / "shards/manifest.json").write_bytes(json_bytes({**fields, "root": sha256_json(fields)}))
    with pytest.raises(DataError, match="not the fields of a manifest"):
        ShardStore(folder / "shards")


def with_index(folder, change):
    """The folder with ``change(records)`` as the index of a shard, and hashes that say so."""
    fields = Manifest.load(folder / "shards").to_dict()
    path = folder / "shards" / "shard-000001.idx.npy"
    np.save(path, change(np.load(path)))
    del fields["root"]
    fields["shards"][1]["index_sha256"] = sha256_file(path)
    (folder / "shards/manifest.json").write_bytes(json_bytes({**fields, "root": sha256_json(fields)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda records: records[:-1], r"idx\.npy: documents, tokens, bytes and blocks are \(\d+, "),
        (lambda records: records["offset"], r"idx\.npy: uint64 \(\d+,\) instead of "),
        (lambda records: records[None], r"idx\.npy: .* \(1, \d+\) instead of "),
    ],
    ids=["shorter", "one field", "two dimensions"],
)
def test_an_index_that_is_none_of_its_shard_is_one_line(folder, change, message):
    with_index(folder, change)
    with pytest.raises(DataError, match=message) as caught:
        ShardStore(folder / "shards")
    assert "\n" not in str(caught.value)


def test_a_manifest_whose_shards_hold_other_than_it_says(folder):
    fields = Manifest.load(folder / "shards").to_dict()
    del fields["root"]
    fields["tokens"] += 1
    (folder / "shards/manifest.json").write_bytes(json_bytes({**fields, "root": sha256_json(fields)}))
    with pytest.raises(
        DataError, match=r"documents and tokens of its shards are \(41, \d+\), of its manifest"
    ):
        ShardStore(folder / "shards")


def rewritten(plan, change):
    """The plan's file with its zip entries changed by ``change(name, data)``."""
    written = io.BytesIO()
    with zipfile.ZipFile(plan) as source, zipfile.ZipFile(written, "w") as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return written.getvalue()


def patched(data, signature, offset, value):
    """Both kinds of zip headers with a field set."""
    data, at = bytearray(data), 0
    while (at := data.find(signature, at)) >= 0:
        struct.pack_into("<H", data, at + offset, value)
        at += 4
    return bytes(data)


def compressed_unknown(path):
    return patched(patched(path.read_bytes(), b"PK\x03\x04", 8, 99), b"PK\x01\x02", 10, 99)


def encrypted(path):
    return patched(patched(path.read_bytes(), b"PK\x03\x04", 6, 1), b"PK\x01\x02", 8, 1)


def future_version(path):
    return patched(path.read_bytes(), b"PK\x01\x02", 6, 90)


def meta(text):
    def make(path):
        array = io.BytesIO()
        np.save(array, np.frombuffer(text, np.uint8))
        return rewritten(path, lambda name, data: array.getvalue() if name == "meta.npy" else data)

    return make


GOOD = b'"format": "roformer_dist.plan", "version": 2'


@pytest.mark.parametrize(
    "make",
    [
        compressed_unknown,
        encrypted,
        future_version,
        meta(b"[1]"),
        meta(b"\xff"),
        meta(b"{%s}" % GOOD),
        meta(b'{%s, "seq_len": 64, "manifest_root": "a", "options": 5, "hash": "a"}' % GOOD),
        meta(b'{%s, "seq_len": 64, "manifest_root": "a", "options": {"x": 1, "upsample": []}}' % GOOD),
        lambda path: rewritten(path, lambda name, data: data[:40]),
        lambda path: rewritten(path, lambda name, data: b"\x93NUMPY\x01\x00v\x00{'descr': 9" + data[16:]),
        lambda path: path.read_bytes()[:-30],
        lambda path: b"",
        lambda path: b"PK\x05\x06" + bytes(18),
        lambda path: (tiny().root / "shards/shard-000000.idx.npy").read_bytes(),
    ],
    ids=range(14),
)
def test_a_damaged_plan_is_one_line(folder, make):
    path = folder / "plan.npz"
    path.write_bytes(make(path))
    with pytest.raises(DataError, match=r"plan\.npz: ") as caught:
        Plan.load(path)
    assert "\n" not in str(caught.value)


def test_a_plan_of_another_version_says_so(folder):
    with np.load(folder / "plan.npz") as file:
        record = file["meta"].tobytes()
    (folder / "plan.npz").write_bytes(
        meta(record.replace(b'"version": 2', b'"version": 3'))(folder / "plan.npz")
    )
    message = (
        r"plan\.npz: format 'roformer_dist\.plan' version 3, this program reads .* version 2; pack it again"
    )
    with pytest.raises(DataError, match=message):
        Plan.load(folder / "plan.npz")


def test_a_plan_that_was_changed_and_hashed_again_is_found_by_verify(folder):
    plan = Plan.load(folder / "plan.npz")
    other = plan.document.copy()
    other[0] = (other[0] + 1) % len(tiny().store)
    replace(plan, document=other).save(folder / "plan.npz")
    assert verify_plan(load_plans(folder / "plan.npz"), tiny().store)


def test_of_1000_flips_of_one_byte_none_delivers_a_wrong_row(folder, original):
    generator = random.Random(11)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    # Half by size, half by file, so that the small ones have their share.
    chosen = generator.choices(files, weights=sizes, k=FLIPS // 2) + generator.choices(files, k=FLIPS // 2)
    found = 0
    for path in chosen:
        data = path.read_bytes()
        changed = bytearray(data)
        changed[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        try:
            assert deliver(folder) == original, path
        except DataError:
            found += 1
        finally:
            path.write_bytes(data)
    assert FLIPS // 2 < found < FLIPS, found
