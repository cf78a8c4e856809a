"""The tokenizer of an imported model: the same ids as transformers', in shards, and one line where it cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import transformers
from byte_level import TEXTS, make
from tokenizers import Tokenizer

from roformer_dist.data.errors import DataError
from roformer_dist.data.files import json_bytes
from roformer_dist.data.inputs import find_inputs
from roformer_dist.data.json_tokenizer import NO_TOKEN, JsonTokenizer, open_tokenizer
from roformer_dist.data.manifest import Manifest
from roformer_dist.data.shards import write_shards
from roformer_dist.data.store import ShardStore
from roformer_dist.data.verify import verify_shards


@pytest.mark.parametrize("bos", [True, False])
def test_ids_are_those_of_transformers_but_a_special_token_s_name_is_text(tmp_path, bos):
    path = make(tmp_path, bos=bos)
    ours = open_tokenizer(path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    assert isinstance(ours, JsonTokenizer)
    assert (ours.vocab_size, ours.eos_id) == (len(theirs), theirs.eos_token_id)
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert ids == theirs.encode(text)
        assert (ids[:1] == [theirs.bos_token_id]) == bos
        assert theirs.eos_token_id not in ids
        assert ours.decode(ids) == text
    assert (ours.pad_id, ours.mask_id) == (ours.eos_id, NO_TOKEN)


def test_settings_decide_bos_and_other_special_tokens(tmp_path):
    path = make(tmp_path, bos=False, pad_token="<|pad|>", mask_token="<|mask|>")
    size = Tokenizer.from_file(str(path)).get_vocab_size(with_added_tokens=False)
    assert JsonTokenizer(path).encode("x").tolist()[0] != 0
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    tokenizer = JsonTokenizer(path)
    assert tokenizer.encode("x").tolist()[0] == tokenizer.special_ids["bos_token_id"] == 0
    ids = tokenizer.special_ids["pad_token_id"], tokenizer.pad_id, tokenizer.mask_id
    assert ids == (size, size, size + 1)
    assert tokenizer.vocab_size == size + 2


def test_a_text_longer_than_the_model_is_whole(tmp_path):
    path = make(tmp_path)
    values = json.loads(path.read_text())
    values["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|begin|>",
    }
    path.write_text(json.dumps(values))
    tokenizer = JsonTokenizer(path)
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]
    assert len(tokenizer.encode("x")) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_in_its_tokens_are_read_checked_and_reused(tmp_path, workers):
    path = make(tmp_path / "tokenizer")
    (tmp_path / "text").mkdir()
    for number, text in enumerate(TEXTS[:3]):
        (tmp_path / f"text/{number}.txt").write_text(text, newline="")
    files = find_inputs([str(tmp_path / "text")])
    tokenizer = JsonTokenizer(path)
    write_shards(files, tokenizer, tmp_path / "shards", workers=workers)
    with ShardStore(tmp_path / "shards") as store:
        assert store.tokenizer_path.name == "tokenizer.json"
        assert store.manifest.tokenizer_sha256 == tokenizer.sha256
        for document, text in enumerate(TEXTS[:3]):
            expected = [*tokenizer.encode(text).tolist(), tokenizer.eos_id]
            assert store.read(document).tolist() == expected
        copy = open_tokenizer(store.tokenizer_path)
        assert copy.decode(store.read(1)) == TEXTS[1]
    checked = dict(verify_shards(tmp_path / "shards"))
    assert checked["tokenizer.json"] is None
    assert write_shards(files, tokenizer, tmp_path / "shards", workers=workers).reused
    (tmp_path / "shards/tokenizer.json").write_bytes(b"{}")
    assert "tokenizer.json: sha256" in str(dict(verify_shards(tmp_path / "shards"))["tokenizer.json"])


def test_what_the_files_beside_it_decide_is_part_of_what_was_built(tmp_path):
    path = make(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("x")
    files = find_inputs([str(tmp_path / "a.txt")])
    write_shards(files, JsonTokenizer(path), tmp_path / "shards")
    settings = json.loads(path.with_name("tokenizer_config.json").read_text())
    changes = {"eos 1, but this run has 0": {"eos_token": "<|begin|>"}, "prefix": {"add_bos_token": False}}
    for message, change in changes.items():
        path.with_name("tokenizer_config.json").write_text(json.dumps(settings | change))
        with pytest.raises(DataError, match=message):
            write_shards(files, JsonTokenizer(path), tmp_path / "shards")


def test_a_manifest_may_not_name_another_file_as_its_tokenizer(tmp_path):
    path = make(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("x")
    write_shards(find_inputs([str(tmp_path / "a.txt")]), JsonTokenizer(path), tmp_path / "shards")
    manifest = Manifest.load(tmp_path / "shards")
    wrong = replace(manifest, inputs=manifest.inputs | {"tokenizer": "../a.txt"})
    (tmp_path / "shards/manifest.json").write_bytes(json_bytes(wrong.to_dict()))
    with pytest.raises(DataError, match=r"not the fields of a manifest \(tokenizer '\.\./a\.txt'\)"):
        ShardStore(tmp_path / "shards")


def no_eos(path: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path.with_name(name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_text("{"), r"tokenizer\.json: not a tokenizer\.json"),
        (lambda path: path.write_text('{"version": "1.0"}'), r"tokenizer\.json: not a tokenizer\.json"),
        (no_eos, r"no eos_token in tokenizer_config\.json"),
        (lambda path: path.with_name("tokenizer_config.json").write_text("["), "not JSON"),
        (lambda path: path.with_name("tokenizer_config.json").write_text("[1]"), "not a JSON object"),
    ],
)
def test_what_cannot_be_used_is_one_line_before_anything_is_read(tmp_path, damage, message):
    path = make(tmp_path / "tokenizer")
    damage(path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=message) as caught:
        write_shards(find_inputs([str(tmp_path / "a.txt")]), open_tokenizer(path), tmp_path / "shards")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "shards").exists()


def test_a_lone_surrogate_is_not_text(tmp_path):
    with pytest.raises(DataError, match="character 1 is the lone surrogate"):
        JsonTokenizer(make(tmp_path)).encode("a\ud800")


def test_ids_that_need_32_bits_are_counted_by_the_largest(tmp_path):
    path = make(tmp_path)
    values = json.loads(path.read_text())
    values["model"]["vocab"]["far"] = 70_000
    path.write_text(json.dumps(values))
    (tmp_path / "a.txt").write_text("x")
    write_shards(find_inputs([str(tmp_path / "a.txt")]), JsonTokenizer(path), tmp_path / "shards")
    with ShardStore(tmp_path / "shards") as store:
        assert (store.manifest.dtype, store.manifest.vocab_size) == ("uint32", 70_001)
        assert store.read(0).dtype == np.int64
