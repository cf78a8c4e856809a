"""A reader of rows written from docs/data_format.md alone, compared with ours."""

from __future__ import annotations

import json
import shutil
import tarfile
import zlib

import numpy as np
import pytest
from test_data_tiny import tiny
from typer.testing import CliRunner

from data_tools.app import app
from roformer_dist.data.errors import DataError
from roformer_dist.data.packing import make_plans, save_plans
from roformer_dist.data.plan import PackOptions, load_plans
from roformer_dist.data.rows import read_row


class PageReader:
    """Rows of a plan, or of one plan in a folder of buckets, from a shards folder."""

    def __init__(self, shards, plan):
        self.manifest = json.loads((shards / "manifest.json").read_text())
        self.documents = []
        for shard in self.manifest["shards"]:
            index = np.load(shards / shard["name"].replace(".tar", ".idx.npy"))
            with tarfile.open(shards / shard["name"]) as tar:
                for record in index:
                    name = f"{len(self.documents):012d}.tokens.bin"
                    data = tar.extractfile(name).read()
                    assert zlib.crc32(data) == record["crc32"]
                    dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
                    self.documents.append(np.frombuffer(data, dtype).astype(np.int64))
        self.plan = np.load(plan)
        self.meta = json.loads(self.plan["meta"].tobytes())
        assert (self.meta["format"], self.meta["version"]) == ("roformer_dist.plan", 2)
        assert self.meta["manifest_root"] == self.manifest["root"]

    def __len__(self):
        return len(self.plan["row_offsets"]) - 1

    def row(self, number):
        """Tokens, targets, and the length of each part that attends to itself."""
        seq_len = self.meta["seq_len"]
        tokens, targets, parts = [], [], []
        first, last = self.plan["row_offsets"][number : number + 2]
        for piece in range(first, last):
            document = self.documents[self.plan["document"][piece]]
            begin = int(self.plan["start"][piece])
            end = begin + int(self.plan["length"][piece])
            assert bool(self.plan["ends_document"][piece]) == (end == len(document))
            tokens += document[begin:end].tolist()
            targets += [*document[begin + 1 : end + 1].tolist(), *([-100] if end == len(document) else [])]
            parts.append(end - begin)
        if not self.meta["options"]["document_mask"]:
            parts = [sum(parts)]
        padding = seq_len - len(tokens)
        tokens += [self.manifest["pad_id"]] * padding
        targets += [-100] * padding
        return tokens, targets, parts + [padding] * bool(padding)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "concat", "document_mask": False, "shards_per_group": 1},
        {"upsample": ((200, 2.5),), "max_padding": 0.0, "shards_per_group": 2},
        {"method": "bucket", "min_len": 8},
    ],
)
def test_the_page_says_enough_to_read_rows(tmp_path, options):
    store = tiny().store
    plans = make_plans(store, 64, PackOptions(**options))
    save_plans(plans, tmp_path / "plan")
    for plan in plans:
        bucket = options.get("method") == "bucket"
        reader = PageReader(
            tiny().root / "shards",
            tmp_path / "plan" / f"len_{plan.seq_len:06d}.npz" if bucket else tmp_path / "plan",
        )
        assert len(reader) == plan.num_rows
        for number in range(0, plan.num_rows, 3):
            tokens, targets, parts = reader.row(number)
            ours = read_row(store, plan, number)
            assert tokens == ours.tokens.tolist()
            assert targets == ours.next_tokens.tolist()
            assert parts == list(ours.lengths)


def test_a_folder_of_buckets_is_checked(tmp_path):
    store = tiny().store
    plans = make_plans(store, 64, PackOptions(method="bucket", min_len=8))
    folder = tmp_path / "buckets"
    save_plans(plans, folder)
    assert [plan.hash for plan in load_plans(folder)] == [plan.hash for plan in plans]
    make_plans(store, 64, PackOptions(method="bucket", min_len=8, seed=1))[0].save(folder / "len_000008.npz")
    with pytest.raises(DataError, match=r"len_000008.npz: hash .* buckets.json says .* pack it again"):
        load_plans(folder)
    (folder / "len_000008.npz").unlink()
    with pytest.raises(DataError, match=r"len_000008.npz: no such plan"):
        load_plans(folder)
    record = (folder / "buckets.json").read_text()
    (folder / "buckets.json").write_text(record.replace("len_000016", "len_000017"))
    with pytest.raises(DataError, match=r"buckets.json: its content does not match its hash"):
        load_plans(folder)
    with pytest.raises(DataError, match=r"no buckets.json, so not a folder of plans"):
        load_plans(tmp_path)
    with pytest.raises(DataError, match="exists and is not an empty folder"):
        save_plans(plans, folder)


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code or isinstance(result.exception, DataError), result.output
    return result


def test_the_commands_on_every_kind_of_plan(tmp_path):
    shards = tiny().root / "shards"
    buckets, plan = tmp_path / "buckets", tmp_path / "plan.npz"
    pack = ("pack", "--shards", shards, "--seq-len", 64)
    shown = run(*pack, "--out", buckets, "--method", "bucket", "--min-len", 8).stdout
    assert "Buckets" in shown
    assert "microseconds per document" in shown
    options = ("--upsample", "200:2.5", "--group-by-key", "--no-document-mask", "--shards-per-group", 1)
    packed = json.loads(run(*pack, "--out", plan, *options, "--json").stdout)
    assert packed["upsampled_token_percent"] > 50
    assert packed["document_mask"] is False
    assert packed["shard_groups"] == len(tiny().store.manifest.shards)
    for path in (buckets, plan):
        values = json.loads(run("inspect", path, "--json").stdout)
        assert values["document_mask"] is (path == buckets)
        lengths = tiny().store.lengths
        assert sum(octave["count"] for octave in values["document_lengths"]) == len(lengths)
        assert sum(octave["tokens"] for octave in values["document_lengths"]) == lengths.sum()
        assert sum(octave["tokens"] for octave in values["piece_lengths"]) == values["tokens"]
        assert sum(part["rows"] for part in values["row_fill"]) == values["rows"]
        assert "How full the rows are" in run("inspect", path).stdout
        checked = json.loads(run("verify", path, "--shards", shards, "--json").stdout)
        assert checked["problems"] == []
    row = json.loads(
        run("inspect", buckets, "--row", 0, "--seq-len", 64, "--shards", shards, "--json").stdout
    )
    assert (len(row["pieces"]), row["row_tokens"]) == (1, 64)
    assert row["pieces"][0]["text"]
    assert "Tokens of a document" in run("inspect", shards).stdout
    for message, args in {
        "choose one with --seq-len": ("inspect", buckets, "--row", 0),
        "--row 1: is for a plan": ("inspect", shards, "--row", 1),
        "is a plan; give --row": ("inspect", plan, "--document", 1),
        "give MIN_TOKENS:FACTOR": (*pack, "--out", plan, "--upsample", "many"),
        "the factor 1 to 1000": (*pack, "--out", plan, "--upsample", "5:0.5"),
        "does nothing with --method bucket": (*pack, "--out", plan, "--method", "bucket", "--group-by-key"),
        "only buckets have it": (*pack, "--out", plan, "--min-len", 4),
        "only best-fit has it": (*pack, "--out", plan, "--method", "concat", "--max-padding", 0.1),
        "--window 0: give at least 1": (*pack, "--out", plan, "--window", 0),
    }.items():
        assert message in str(run(*args).exception)


def test_verify_names_shard_key_and_blocks_file(tmp_path):
    shutil.copytree(tiny().root / "shards", tmp_path / "shards")
    for name in ("shard-000000.tar", "shard-000001.blocks.npy"):
        data = bytearray((tmp_path / "shards" / name).read_bytes())
        where = 1536 if name.endswith("tar") else -1
        data[where] ^= 1
        (tmp_path / "shards" / name).write_bytes(data)
    result = run("verify", tmp_path / "shards", code=1)
    assert result.exit_code == 1
    assert "shard-000000.tar: document 000000000000 fails its crc32" in result.stderr
    assert "shard-000001.blocks.npy: sha256" in result.stderr
