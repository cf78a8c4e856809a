import gzip
import hashlib
import json
import os
import random
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import replace
from importlib import import_module

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from roformer_dist.data import inputs as inputs_module
from roformer_dist.data.documents import BadDocument, TextOptions, decode, located, read_texts
from roformer_dist.data.errors import DataError
from roformer_dist.data.inputs import InputChanged, InputFile, find_inputs, measure_inputs
from roformer_dist.data.records import read_records

TEXTS = ["one", "two\nlines", "caf\u00e9 \u2581 \U0001f600", "\u2028 inside", "last"]
LINES = b"".join(json.dumps({"id": i, "text": text}).encode() + b"\n" for i, text in enumerate(TEXTS))


def texts_of(*inputs, **options):
    return list(read_texts(find_inputs([str(path) for path in inputs]), TextOptions(**options)))


def zstd_frames(data, cut):
    compress = zstandard.ZstdCompressor().compress
    return compress(data[:cut]) + compress(data[cut:])


def write_table(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)


def write_all_kinds(folder):
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(LINES[:50]) + gzip.compress(LINES[50:]))
    (folder / "c.jsonl.zst").write_bytes(zstd_frames(LINES, 50))
    write_table(folder / "d.parquet", {"id": range(5), "text": TEXTS}, row_group_size=2)
    for number, text in enumerate(TEXTS):
        (folder / f"e{number}.txt").write_bytes(text.encode())
    (folder / "note.md").write_text("not an input")


def test_every_kind_gives_the_same_documents(tmp_path):
    write_all_kinds(tmp_path)
    for pattern in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e*.txt"):
        assert texts_of(tmp_path / pattern) == TEXTS, pattern
    assert texts_of(tmp_path) == TEXTS * 5


def test_a_zstd_file_without_sizes_and_a_last_line_without_its_newline(tmp_path):
    long = zstandard.ZstdCompressionParameters(
        window_log=28, hash_log=10, chain_log=10
    )  # as of zstd --long=28
    for parameters in (None, long):
        compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        data = compressor.compress(LINES[:-1]) + compressor.flush()
        (tmp_path / "a.jsonl.zst").write_bytes(data)
        assert texts_of(tmp_path) == TEXTS
    # A frame of more than is read at once.
    large = [random.Random(number).randbytes(50_000).hex() for number in range(6)]
    lines = "\n".join(json.dumps({"text": text}) for text in large).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    assert texts_of(tmp_path) == large


@pytest.mark.parametrize("kind", ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"])
def test_reading_goes_on_at_any_record(tmp_path, kind):
    write_all_kinds(tmp_path)
    (file,) = find_inputs([str(tmp_path / kind)])
    for first in range(7):
        found = read_records(7, file, text_column="text", group_by=None, first=first)
        assert [(r.file, r.position) for r in found] == [(7, i) for i in range(first, 5)]


def test_inputs_are_sorted_named_and_unique(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", "note.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "sub" / "again.txt").symlink_to(tmp_path / "a.txt")
    outside = tmp_path.with_name("outside.text")
    outside.write_text("elsewhere")
    (tmp_path / "sub" / "d.txt").symlink_to(outside)
    folder = find_inputs([str(tmp_path)])
    assert [file.name for file in folder] == ["a.txt", "b.txt", "sub/c.txt", "sub/d.txt"]
    assert [file.size for file in folder] == [5, 5, 9, 9]
    root = tmp_path.name
    assert [file.folder for file in folder] == [root, root, f"{root}/sub", f"{root}/sub"]
    assert [file.name for file in find_inputs([str(tmp_path / "*.txt")])] == ["a.txt", "b.txt"]
    assert [file.name for file in find_inputs([str(tmp_path / "**/c*.txt")])] == ["sub/c.txt"]
    assert len(find_inputs([str(tmp_path), str(tmp_path / "a.txt")])) == 4
    (tmp_path / "odd[1].txt").write_text("x")
    assert [file.name for file in find_inputs([str(tmp_path / "odd[1].txt")])] == ["odd[1].txt"]
    (tmp_path / "set[1]").mkdir()
    (tmp_path / "set[1]" / "e.txt").write_text("x")
    assert [file.name for file in find_inputs([str(tmp_path / "set[1]")])] == ["e.txt"]
    shutil.rmtree(tmp_path / "set[1]")
    (tmp_path / "folder").symlink_to(tmp_path / "sub")
    with pytest.raises(DataError, match="folder is a link to a folder and not followed"):
        find_inputs([str(tmp_path)])
    (tmp_path / "folder").unlink()
    ignored = Counter()
    assert len(find_inputs([str(tmp_path), str(tmp_path / "**")], ignored)) == 5
    assert ignored == {".md": 1}
    with pytest.raises(DataError, match=r"--input .*absent: no such file or folder$"):
        find_inputs([str(tmp_path / "absent")])
    for bad in (str(tmp_path / "*.none"), str(tmp_path / "note.md")):
        with pytest.raises(DataError, match=r"--input .*: no \.txt, \.jsonl, .* file found"):
            find_inputs([bad])


@pytest.mark.parametrize("name", ["", "s3://", "file://"])
def test_a_variable_that_is_not_set_names_nothing(name):
    with pytest.raises(DataError, match=r"--input '.*': names nothing"):
        find_inputs([name])


def make_odd(folder, kind):
    odd = folder / "sub" / "x.txt"
    odd.parent.mkdir()
    if kind == "folder":
        odd.mkdir()
        (odd / "inside.txt").write_text("lost")
    elif kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to(folder / "gone.txt")


@pytest.mark.parametrize(
    ("kind", "inputs", "message"),
    [
        (
            "folder",
            ("*", "sub/*.txt", "**/*.txt"),
            "is a folder that the glob matches; name the folder itself",
        ),
        ("pipe", (".", "sub", "sub/*", "**/*.txt", "sub/x.txt"), "is neither a file nor a folder"),
        (
            "link",
            (".", "sub", "sub/*", "**/*.txt", "sub/x.txt"),
            "is a link to .*gone.txt, which is not there",
        ),
    ],
)
def test_what_is_no_file_is_not_passed_over(tmp_path, kind, inputs, message):
    (tmp_path / "good.txt").write_text("good")
    make_odd(tmp_path, kind)
    for found in inputs:
        for text in (f"{tmp_path}/{found}", f"file://{tmp_path}/{found}"):
            with pytest.raises(DataError, match=message) as caught:
                find_inputs([text])
            assert "\n" not in str(caught.value)
    if kind == "folder":
        assert [file.name for file in find_inputs([f"{tmp_path}/**"])] == ["good.txt", "sub/x.txt/inside.txt"]


def test_a_folder_that_may_not_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "good.txt").write_text("good")
    # root may list any.
    access = lambda path, mode: not str(path).endswith("sub")  # noqa: E731
    monkeypatch.setattr(os, "access", access)
    with pytest.raises(DataError, match="sub is a folder that may not be listed"):
        find_inputs([str(tmp_path)])


def test_a_bucket_without_credentials_is_said_with_the_fix(tmp_path, monkeypatch):
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(
        DataError, match=r"--input s3://no/x\.txt: .*redentials.*; .* set AWS_PROFILE"
    ) as caught:
        find_inputs(["s3://no/x.txt"])
    assert "\n" not in str(caught.value)


def test_a_name_that_fsspec_would_take_for_a_url_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data:,1.txt").write_text("here")
    assert texts_of("data:,1.txt") == texts_of("~/*1.txt") == ["here"]
    with pytest.raises(DataError, match=r"--input data:,2\.txt: no such file or folder"):
        find_inputs(["data:,2.txt"])


@pytest.mark.parametrize("encoding", ["klingon", "base64", "rot13", "undefined", ""])
def test_an_encoding_that_makes_no_text_is_refused(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=f"--encoding {encoding}: no such encoding"):
        texts_of(tmp_path, encoding=encoding)
    (tmp_path / "a.txt").write_text("a", encoding="utf-16")
    assert texts_of(tmp_path, encoding="utf-16") == ["a"]


def test_hidden_files_are_files(tmp_path):
    (tmp_path / ".hidden").mkdir()
    for name in (".a.txt", ".hidden/b.txt"):
        (tmp_path / name).write_text("x")
    assert [file.name for file in find_inputs([str(tmp_path)])] == [".a.txt", ".hidden/b.txt"]


def test_hashing_says_how_far_it_is_inside_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs_module, "_HASHED", 10)
    contents = [b"", b"a" * 25, b"b" * 7]
    for number, data in enumerate(contents):
        (tmp_path / f"{number}.txt").write_bytes(data)
    files = find_inputs([str(tmp_path)])
    told = []
    assert files[1].measured(told.append) == (files[1], hashlib.sha256(contents[1]).hexdigest())
    assert told == [10, 10, 5]
    told.clear()
    unsized = [replace(file, size=0) for file in files]
    expected = files, [hashlib.sha256(data).hexdigest() for data in contents]
    assert measure_inputs(unsized, 2, told.append) == expected
    assert sum(told) == 32
    (tmp_path / "1.txt").unlink()
    with pytest.raises(DataError, match=r"1\.txt: no such file"):
        measure_inputs(files, 2, told.append)
    # The files after one that cannot be read are not hashed first.
    begun, measured = [], InputFile.measured
    monkeypatch.setattr(InputFile, "measured", lambda *a: begun.append(a) or time.sleep(0.05) or measured(*a))
    with pytest.raises(DataError, match=r"1\.txt: no such file"):
        measure_inputs([files[1]] + 30 * files[2:], 1, told.append)
    assert len(begun) < 30


def test_urls_are_read_as_paths_are(tmp_path):
    import fsspec

    write_all_kinds(tmp_path)
    assert texts_of(f"file://{tmp_path}") == TEXTS * 5
    memory = fsspec.filesystem("memory")
    for path in tmp_path.iterdir():
        memory.pipe(f"/corpus/sub/{path.name}", path.read_bytes())
    try:
        files = find_inputs(["memory://corpus"])
        assert [file.name for file in files][:2] == ["sub/a.jsonl", "sub/b.jsonl.gz"]
        assert texts_of("memory://corpus") == TEXTS * 5
        assert texts_of("memory://corpus/sub/*.parquet") == TEXTS
        # What came is not what was hashed.
        for file in files[0], files[3]:
            with pytest.raises(InputChanged, match=r"[ad]\.(jsonl|parquet): changed while it was being read"):
                list(read_records(0, file, text_column="text", group_by=None, sha256="0" * 64))
    finally:
        memory.rm("/corpus", recursive=True)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl.gz", gzip.compress(LINES)[:-9], r"a\.jsonl\.gz: damaged gzip file"),
        ("a.jsonl.gz", LINES, r"a\.jsonl\.gz: damaged gzip file"),
        ("a.jsonl.zst", zstd_frames(LINES, 50)[:-3], r"a\.jsonl\.zst: ends inside a zstd frame"),
        ("a.jsonl.zst", zstd_frames(LINES, 50) + b"nonsense", r"a\.jsonl\.zst: damaged zstd file"),
        ("a.parquet", LINES, r"a\.parquet: not a readable parquet file"),
    ],
)
def test_a_damaged_file_is_named_and_never_ends_early(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        texts_of(tmp_path, on_bad="skip")
    assert "\n" not in str(caught.value)


def test_columns_of_a_table_are_checked(tmp_path):
    write_table(tmp_path / "a.parquet", {"id": [1], "body": ["x"], "scores": [[1.0]]})
    assert texts_of(tmp_path, text_column="body") == ["x"]
    for options, message in (
        ({}, r"a\.parquet: no column 'text' \(--text-column\); it has: id, body, scores"),
        ({"text_column": "id"}, r"column 'id' \(--text-column\) holds int64, not strings"),
    ):
        with pytest.raises(DataError, match=message):
            texts_of(tmp_path, **options, on_bad="skip")
    (file,) = find_inputs([str(tmp_path)])
    for column, message in (("repo", "no column 'repo'"), ("scores", r"'scores' \(--group-by\) holds list")):
        with pytest.raises(DataError, match=message):
            list(read_records(0, file, text_column="body", group_by=column))


def test_dictionaries_and_large_strings_are_text(tmp_path):
    columns = {"text": pa.array(TEXTS, pa.large_string()), "kind": pa.array(["a"] * 5).dictionary_encode()}
    write_table(tmp_path / "a.parquet", columns)
    assert texts_of(tmp_path) == TEXTS
    assert texts_of(tmp_path, text_column="kind") == ["a"] * 5


BAD_LINES = {
    b'{"text": "cut"': ("not JSON", r"not JSON \(Expecting ',' delimiter at character 14"),
    b"": ("not JSON", "not JSON"),
    b"[1]": ("not an object", "a JSON list, not an object"),
    b'{"body": "x", "id": 2}': ("no text", r"no field 'text' \(--text-column\); it has: body, id"),
    b'{"text": 5}': ("not a string", "holds int, not a string"),
    b'{"text": null}': ("not a string", "holds NoneType"),
    b'{"text": "\xff"}': ("undecodable", "not UTF-8 at byte 10"),
    rb'{"text": "a\ud800"}': ("undecodable", r"character 1 is the lone surrogate U\+D800"),
    b'{"text": ""}': ("empty", "the document is empty"),
    b"[" * 100_000: ("not JSON", "too deeply nested"),
    b'{"text": ' + b"9" * 5000 + b"}": ("not JSON", "not JSON that can be read .*4300 digits"),
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20].decode(errors="replace"))
def test_a_bad_line_stops_with_its_number_or_is_counted(tmp_path, line):
    reason, message = BAD_LINES[line]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + 2 * (line + b"\n") + b'{"text": "after"}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{message}.*--on-bad-document skip") as caught:
        texts_of(tmp_path)
    assert "\n" not in str(caught.value)
    skipped = Counter()
    found = read_texts(find_inputs([str(tmp_path)]), TextOptions(on_bad="skip"), skipped=skipped)
    assert list(found) == ["good", "after"]
    assert skipped == {reason: 2}


def test_a_group_that_is_no_text_is_a_bad_document(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "repo": "a\\ud800"}\n{"text": "y", "repo": "b"}\n')
    raw = pa.array([b"fine", b"caf\xe9", None], pa.binary())
    for kind in (pa.string(), pa.large_string()):
        buffers = raw.cast(pa.large_binary() if kind == pa.large_string() else pa.binary()).buffers()
        column = pa.Array.from_buffers(kind, 3, buffers)
        write_table(tmp_path / f"{kind}.parquet", {"text": ["one", "two", "three"], "repo": column})
    odd = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(odd)
    with open(odd + b"/c.txt", "w") as file:
        file.write("text")
    for name, place, group_by, good in (
        ("a.jsonl", r"a\.jsonl:1", "repo", ["b"]),
        ("string.parquet", r"parquet row 1", "repo", ["fine", None]),
        ("large_string.parquet", r"parquet row 1", "repo", ["fine", None]),
        ("caf*/*.txt", r"c\.txt", "parent", []),
    ):
        (file,) = find_inputs([str(tmp_path / name)])
        groups, bad = [], []
        options = TextOptions(group_by=group_by)
        for record in read_records(0, file, text_column="text", group_by=group_by):
            try:
                groups.append(decode(record, options).group)
            except BadDocument as problem:
                bad.append((problem.reason, located(file, record, problem)))
        ((reason, line),) = bad
        assert reason == "bad group"
        assert re.search(rf"{place}: the group '.*' is not text in UTF-8; .*--on-bad-document skip", line)
        assert groups == good


@pytest.mark.parametrize("group", [True, 1.5, ["a"], {"a": 1}])
def test_a_group_that_is_no_string_or_whole_number_is_a_bad_document(tmp_path, group):
    lines = [json.dumps({"text": "x", "repo": repo}) for repo in (group, -(10**30), None, "b")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (file,) = find_inputs([str(tmp_path)])
    options = TextOptions(group_by="repo")
    bad, *good = read_records(0, file, text_column="text", group_by="repo")
    with pytest.raises(BadDocument, match=rf"field 'repo' holds {type(group).__name__}, not") as caught:
        decode(bad, options)
    assert caught.value.reason == "bad group"
    assert [decode(record, options).group for record in good] == ["-1" + 30 * "0", None, "b"]


def test_a_table_says_how_far_it_is_and_is_not_changed_meanwhile(tmp_path):
    write_table(tmp_path / "a.parquet", {"text": TEXTS}, row_group_size=2)
    (file,) = find_inputs([str(tmp_path)])
    told = []
    # A column may be the text and its own group.
    records = read_records(0, file, text_column="text", group_by="text", progress=told.append)
    assert [(record.data.decode(), record.group) for record in records] == [*zip(TEXTS, TEXTS)]
    assert told == [
        file.size * 2 // 5,
        file.size * 4 // 5 - file.size * 2 // 5,
        file.size - file.size * 4 // 5,
    ]
    records = read_records(0, file, text_column="text", group_by=None)
    next(records)
    os.utime(tmp_path / "a.parquet", (1, 1))
    with pytest.raises(InputChanged, match=r"a\.parquet: changed while it was being read"):
        list(records)


def test_whole_numbers_of_a_table_are_groups(tmp_path):
    numbers = pa.array([7, None])
    for name, column in (("a", numbers), ("b", numbers.dictionary_encode())):
        write_table(tmp_path / f"{name}.parquet", {"text": ["x", "y"], "repo": column})
    for file in find_inputs([str(tmp_path)]):
        records = read_records(0, file, text_column="text", group_by="repo")
        assert [record.group for record in records] == ["7", None]


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["text", "text", "body"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: 2 columns are named 'text' \(--text-column\); rename"):
        texts_of(tmp_path)
    assert texts_of(tmp_path, text_column="body") == ["c"]


def test_bad_rows_and_text_files(tmp_path):
    raw = pa.array([b"fine", b"caf\xe9", None, b""], pa.binary())
    buffers = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    write_table(tmp_path / "a.parquet", {"text": buffers})
    with pytest.raises(DataError, match=r"a\.parquet row 1: not UTF-8 at byte 3"):
        texts_of(tmp_path)
    skipped = Counter()
    found = read_texts(find_inputs([str(tmp_path)]), TextOptions(on_bad="skip"), skipped=skipped)
    assert list(found) == ["fine"]
    assert skipped == {"undecodable": 1, "not a string": 1, "empty": 1}
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin1"))
    latin = tmp_path / "latin.txt"
    with pytest.raises(
        DataError, match=r"latin\.txt: not UTF-8 at byte 3; name the files' own with --encoding"
    ):
        texts_of(latin)
    assert texts_of(latin, encoding="latin-1") == ["caf\u00e9"]
    assert texts_of(latin, errors="replace") == ["caf\ufffd"]


def test_choices_that_do_not_exist_or_do_not_fit_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_bytes(LINES)
    files = find_inputs([str(tmp_path)])
    for options, message in (
        ({"encoding": "klingon"}, "--encoding klingon: no such encoding"),
        ({"encoding": "latin-1"}, r"--encoding latin-1: b\.jsonl is always UTF-8"),
        ({"errors": "ignore"}, "--errors ignore: choose strict or replace"),
        ({"on_bad": "drop"}, "--on-bad-document drop: choose stop or skip"),
        ({"group_by": "repo"}, r"--group-by repo: a\.txt is a text file"),
    ):
        with pytest.raises(DataError, match=message):
            TextOptions(**options).check(files)


@pytest.mark.parametrize(("module", "name"), [("pyarrow.parquet", "d.parquet"), ("zstandard", "c.jsonl.zst")])
def test_an_absent_library_is_named_with_what_installs_it(tmp_path, monkeypatch, module, name):
    write_all_kinds(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(
        DataError, match=rf'{name}: needs {module.split(".")[0]}: pip install "roformer-dist\[formats\]"'
    ):
        texts_of(tmp_path / name)


def test_an_absent_file_system_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    # fsspec keeps the classes that other tests have made it load.
    monkeypatch.delitem(import_module("fsspec.registry")._registry, "s3", raising=False)
    with pytest.raises(DataError, match=r'--input s3://.*s3fs.*pip install "roformer-dist\[remote\]"'):
        find_inputs(["s3://bucket/*.jsonl"])
    with pytest.raises(DataError, match=r"--input klingon://x: cannot be read .*klingon\); .* fsspec opens"):
        find_inputs(["klingon://x"])
