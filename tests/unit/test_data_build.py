"""Building shards in worker processes: the same bytes however many there are and however often it is killed."""

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data_tiny import tiny, tiny_texts
from typer.testing import CliRunner

from data_tools.app import app
from roformer_dist.data import shards as shards_module
from roformer_dist.data.build_state import PartialBuild
from roformer_dist.data.documents import TextOptions
from roformer_dist.data.errors import DataError
from roformer_dist.data.inputs import InputChanged, find_inputs
from roformer_dist.data.shard_writer import group_hash
from roformer_dist.data.shards import write_shards
from roformer_dist.data.store import ShardStore
from roformer_dist.data.verify import verify_shards
from roformer_dist.data.workers import Encoder, encode_batches

SHARD_BYTES = 8192


def make_corpus(folder: Path) -> list[str]:
    """Texts in the order of the inputs: JSON lines, gzip, parquet and text files; some bad, some doubled."""
    folder.mkdir()
    generator = random.Random(1)
    texts = [text * 3 for text in tiny_texts().values()]
    generator.shuffle(texts)
    texts += texts[:7] + texts[20:25]
    lines = [json.dumps({"text": text, "repo": f"r{i % 5}"}) for i, text in enumerate(texts)]
    lines.insert(11, "not json")
    lines.insert(30, '{"text": ""}')
    data = "\n".join(lines).encode()
    (folder / "a.jsonl").write_bytes(data)
    other = [f"{i} {text}" for i, text in enumerate(texts)]
    rows = [json.dumps({"text": text, "repo": 7}).encode() for text in other]
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(rows), mtime=0))
    third = [f"{text} {i}" for i, text in enumerate(texts)]
    table = pa.table({"text": third, "repo": [None, *["x"] * (len(third) - 1)]})
    pq.write_table(table, folder / "c.parquet", row_group_size=10)
    (folder / "notes.md").write_text("no input")
    return texts + other + third


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


OPTIONS = TextOptions(group_by="repo", on_bad="skip")


def build(corpus: Path, out: Path, workers: int = 1, **options):
    options = {"options": OPTIONS, "deduplicate": True, "shard_bytes": SHARD_BYTES} | options
    return write_shards(find_inputs([str(corpus)]), tiny().tokenizer, out, workers=workers, **options)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """``(corpus, texts, shards, their content)``, built by one process in one go."""
    root = tmp_path_factory.mktemp("build")
    texts = make_corpus(root / "corpus")
    build(root / "corpus", root / "shards")
    return root / "corpus", texts, root / "shards", content(root / "shards")


def test_every_document_is_there_once_and_everything_is_counted(reference):
    _, texts, folder, _ = reference
    store = ShardStore(folder)
    found = [tiny().tokenizer.decode(store.read(document)) for document in range(len(store))]
    kept = list(dict.fromkeys(texts))  # the first of equal ones, in order
    assert found == kept
    inputs = store.manifest.inputs
    assert inputs["skipped"] == {"not JSON": 1, "empty": 1}
    assert inputs["duplicates"] == len(texts) - len(kept) > 10
    assert inputs["records"] == store.manifest.documents + inputs["duplicates"] + 2
    assert inputs["text_bytes"] == sum(len(text.encode()) for text in kept)
    assert len(store.manifest.shards) > 10
    assert [problem for _, problem in verify_shards(folder) if problem] == []
    sizes = [2 * shard.tokens for shard in store.manifest.shards]
    assert all(size >= SHARD_BYTES for size in sizes[:-1])


def test_groups_and_places_are_kept(reference):
    import webdataset

    _, _, folder, _ = reference
    store = ShardStore(folder)
    urls = [str(folder / shard.name) for shard in store.manifest.shards]
    meta = [json.loads(sample["json"]) for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    assert meta[0] == {"source": "a.jsonl", "line": 1, "group": "r0"}
    [ungrouped] = [document for document, group in enumerate(store.groups) if group == 0]
    assert meta[ungrouped] == {"source": "c.parquet", "row": 0}
    assert meta[ungrouped - 1]["group"] == "7"
    digest = hashlib.sha256(b"r0").digest()[:8]
    assert store.groups[0] == int.from_bytes(digest, "little") == group_hash("r0")
    assert [group_hash(item.get("group")) for item in meta] == store.groups.tolist()


@pytest.mark.parametrize("workers", [2, 4])
def test_the_bytes_do_not_depend_on_the_workers(reference, tmp_path, monkeypatch, workers):
    corpus, _, _, expected = reference
    monkeypatch.setattr(shards_module, "_BATCH_RECORDS", 7)  # many batches, so that all workers have some
    build(corpus, tmp_path / "out", workers)
    assert content(tmp_path / "out") == expected
    assert os.listdir(tmp_path) == ["out"]


def command(corpus: Path, out: Path, *more: str) -> list[str]:
    options = ["--input", corpus, "--tokenizer", tiny().tokenizer.path, "--out", out, "--workers", 2]
    options += ["--shard-mb", SHARD_BYTES / 2**20, "--deduplicate", "--group-by", "repo"]
    options += ["--on-bad-document", "skip"]
    # Small batches and a rest after each shard, so that a signal finds the build at work.
    code = (
        "import sys, time; from roformer_dist import cli; from roformer_dist.data import build_state, shards\n"
        "finish = build_state.PartialBuild.finish_shard\n"
        "def slow(self, *args):\n"
        "    finish(self, *args); time.sleep(0.15)\n"
        "if __name__ == '__main__':\n"
        "    shards._BATCH_RECORDS = 7; build_state.PartialBuild.finish_shard = slow\n"
        "    sys.argv[0] = 'roformer-dist'; cli.main()\n"
    )
    return [sys.executable, "-c", code, "data", "shards", *map(str, options), *more]


def start(*args, **options) -> subprocess.Popen:
    return subprocess.Popen(
        command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def wait_for_shards(partial: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while len(list(partial.glob("shard-*.json"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive


def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(reference, tmp_path):
    corpus, _, _, expected = reference
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    before: dict[str, int] = {}
    for goal in (2, 9):
        process = start(corpus, out)
        wait_for_shards(partial, goal, process)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate()
        assert_gone(children)
        assert not out.exists()
        # What was finished before this start was not written again.
        times = {path.name: path.stat().st_mtime_ns for path in (partial / "shards").glob("*.tar")}
        assert before.items() <= times.items()
        finished = {path.stem for path in partial.glob("shard-*.json")}
        before = {name: t for name, t in times.items() if name.removesuffix(".tar") in finished}
    done = subprocess.run(command(corpus, out, "--json"), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["resumed_shards"] == len(before) >= 9
    assert content(out) == expected
    assert os.listdir(tmp_path) == ["out"]


def stop_after(monkeypatch, shards: int) -> None:
    """The build ends with an error after so many finished shards."""
    finish = PartialBuild.finish_shard

    def limited(self, shard, progress):
        finish(self, shard, progress)
        if len(self.shards) == shards:
            raise RuntimeError("stopped")

    monkeypatch.setattr(PartialBuild, "finish_shard", limited)


def stopped(corpus, out, monkeypatch, shards=4, **options) -> Path:
    with monkeypatch.context() as patch:
        stop_after(patch, shards)
        with pytest.raises(RuntimeError, match="stopped"):
            build(corpus, out, **options)
    return out.with_name(f".{out.name}.partial")


def test_it_goes_on_after_every_shard(reference, tmp_path, monkeypatch):
    corpus, _, folder, expected = reference
    out = tmp_path / "out"
    last = len(ShardStore(folder).manifest.shards)
    for shards in (*range(1, last, 3), last):
        stopped(corpus, out, monkeypatch, shards)
        assert build(corpus, out).resumed == shards
        assert content(out) == expected
        shutil.rmtree(out)


def test_the_only_shard_is_kept_and_so_are_those_whose_inputs_were_not_noted(
    reference, tmp_path, monkeypatch
):
    corpus, _, _, _ = reference
    build(corpus, tmp_path / "whole", shard_bytes=2**30)
    for note in (True, False):
        partial = stopped(corpus, tmp_path / "out", monkeypatch, 1, shard_bytes=2**30)
        record = json.loads((partial / "shard-000000.json").read_text())
        if not note:  # as before it was noted which inputs a shard depends on
            del record["progress"]["inputs"]
            (partial / "shard-000000.json").write_text(json.dumps(record))
        assert build(corpus, tmp_path / "out", shard_bytes=2**30).resumed == 1
        assert content(tmp_path / "out") == content(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")


def test_a_shard_that_was_written_but_not_noted_is_written_again(reference, tmp_path, monkeypatch):
    # Between the two its documents are known as seen; they must not count as duplicates of themselves.
    corpus, _, _, expected = reference
    finish = PartialBuild.finish_shard

    def before_the_note(self, shard, progress):
        if len(self.shards) == 3:
            raise RuntimeError("stopped")
        finish(self, shard, progress)

    with monkeypatch.context() as patch:
        patch.setattr(PartialBuild, "finish_shard", before_the_note)
        with pytest.raises(RuntimeError, match="stopped"):
            build(corpus, tmp_path / "out")
    assert build(corpus, tmp_path / "out").resumed == 3
    assert content(tmp_path / "out") == expected


@pytest.mark.parametrize("damage", ["shard-000002.tar", "shard-000002.idx.npy", "shard-000002.blocks.npy"])
def test_a_finished_shard_is_trusted_only_whole(reference, tmp_path, monkeypatch, damage):
    corpus, _, _, expected = reference
    partial = stopped(corpus, tmp_path / "out", monkeypatch)
    path = partial / "shards" / damage
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert build(corpus, tmp_path / "out", workers=2).resumed == 2
    assert content(tmp_path / "out") == expected


def test_another_run_is_refused_with_the_difference(reference, tmp_path, monkeypatch):
    corpus, _, folder, _ = reference
    stopped(corpus, tmp_path / "out", monkeypatch)
    differences = {
        "shard_bytes 8192, but this run has 4096": {"shard_bytes": 4096},
        "deduplicate True, but this run has False": {"deduplicate": False},
        "group_by repo, but this run has None": {"options": replace(OPTIONS, group_by=None)},
        r"bad documents were skipped before \(1 empty, 1 not JSON": {
            "options": replace(OPTIONS, on_bad="stop")
        },
    }
    for out in (tmp_path / "out", folder):
        for message, options in differences.items():
            with pytest.raises(DataError, match=message) as caught:
                build(corpus, out, **options)
            assert "\n" not in str(caught.value)
    changed = shutil.copytree(corpus, tmp_path / "corpus")
    text = (changed / "a.jsonl").read_bytes()
    (changed / "a.jsonl").write_bytes(text.replace(b"ing", b"gni"))
    with pytest.raises(
        DataError, match=r"no finished shard of it comes before the first that changed; delete it"
    ):
        build(changed, tmp_path / "out")
    assert build(corpus, tmp_path / "out").resumed == 4


@pytest.mark.parametrize("changed", ["last corrected", "one more", "last gone", "folder renamed"])
def test_shards_before_the_first_file_that_changed_are_kept(reference, tmp_path, monkeypatch, changed):
    corpus = shutil.copytree(reference[0], tmp_path / "corpus")
    whole = len(ShardStore(reference[2]).manifest.shards)
    # All of them: the last was closed by the end of the inputs.
    stopped(corpus, tmp_path / "out", monkeypatch, whole)
    records = [
        json.loads(path.read_text()) for path in sorted((tmp_path / ".out.partial").glob("shard-*.json"))
    ]
    in_first_files = sum(record["progress"]["file"] < 2 for record in records)
    assert 0 < in_first_files < whole
    if changed == "last corrected":
        first = (corpus / "c.parquet").read_bytes()
        pq.write_table(pa.table({"text": ["other"] * 3, "repo": ["x"] * 3}), corpus / "c.parquet")
    elif changed == "one more":
        (corpus / "d.jsonl").write_text('{"text": "one more", "repo": "y"}\n')
    elif changed == "last gone":
        (corpus / "c.parquet").unlink()
    else:
        corpus = corpus.rename(tmp_path / "renamed")
        with pytest.raises(DataError, match="no finished shard of it comes before the first that changed"):
            build(corpus, tmp_path / "out")
        return
    if changed == "last corrected":  # and back, after shards of the correction were written
        stopped(corpus, tmp_path / "out", monkeypatch, in_first_files + 1)
        corrected = (corpus / "c.parquet").read_bytes()
        (corpus / "c.parquet").write_bytes(first)
        stopped(corpus, tmp_path / "out", monkeypatch, in_first_files + 1)
        (corpus / "c.parquet").write_bytes(corrected)
    resumed = build(corpus, tmp_path / "out").resumed
    assert resumed == (whole - 1 if changed == "one more" else in_first_files)
    build(corpus, tmp_path / "afresh")
    assert content(tmp_path / "out") == content(tmp_path / "afresh")


def test_one_build_at_a_time(reference, tmp_path):
    corpus, _, _, _ = reference
    process = start(corpus, tmp_path / "out")
    try:
        wait_for_shards(tmp_path / ".out.partial", 1, process)
        with pytest.raises(DataError, match="another process is building it"):
            build(corpus, tmp_path / "out")
    finally:
        process.kill()
        process.communicate()


def test_a_dead_worker_is_one_line_and_the_build_goes_on_later(reference, tmp_path):
    corpus, _, _, expected = reference
    out = tmp_path / "out"
    process = start(corpus, out)
    wait_for_shards(tmp_path / ".out.partial", 2, process)
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in family if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[0].kill()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output == ""
    assert errors.splitlines()[-1].startswith("error: a worker process ended (SIGKILL; ")
    assert len(errors.splitlines()) == 1
    assert_gone(family)
    assert build(corpus, out).resumed >= 2
    assert content(out) == expected


def test_an_interrupt_ends_it_cleanly(reference, tmp_path):
    corpus, _, _, expected = reference
    out = tmp_path / "out"
    process = start(corpus, out, start_new_session=True)
    wait_for_shards(tmp_path / ".out.partial", 2, process)
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [child.pid for child in family if "spawn_main" in " ".join(child.cmdline())]
    states = [Path(f"/proc/{pid}/status").read_text() for pid in workers]
    # They leave it to the one that started them, and so say nothing of their own.
    ignored = [
        int(line.split()[1], 16) for state in states for line in state.splitlines() if "SigIgn" in line
    ]
    assert [mask >> (signal.SIGINT - 1) & 1 for mask in ignored] == [1, 1]
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, "", "")
    assert_gone(family)
    assert build(corpus, out).resumed >= 2
    assert content(out) == expected


def test_a_bad_document_stops_workers_too(reference, tmp_path):
    corpus, _, _, _ = reference
    done = subprocess.run(
        command(corpus, tmp_path / "out", "--on-bad-document", "stop"),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert "a.jsonl:12: not JSON" in line


def test_a_workers_own_error_is_one_line(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"other")
    encoder = Encoder(tmp_path / "bad.model", "0" * 64, "uint16", TextOptions())
    with pytest.raises(DataError, match=r"^/.*bad\.model: not a sentencepiece model"):
        list(encode_batches(encoder, [[]], 2))
    encoder = Encoder(tiny().tokenizer.path, tiny().tokenizer.sha256, "klingon", TextOptions())
    record = next(iter(_records(tmp_path, "x")))
    with pytest.raises(DataError, match="a worker failed: TypeError: data type 'klingon'"):
        list(encode_batches(encoder, [[record]], 2))
    assert list(encode_batches(encoder, [], 2)) == []
    other = Encoder(tiny().tokenizer.path, "0" * 64, "uint16", TextOptions())
    with pytest.raises(DataError, match=r"tokenizer\.model: changed while shards were written; start again"):
        list(encode_batches(other, [[record]], 1))


def test_no_more_is_read_ahead_than_is_bounded(tmp_path):
    record, taken = next(iter(_records(tmp_path, "x"))), []

    def batches():
        for number in range(200):
            taken.append(number)
            yield [record]

    encoder = Encoder(tiny().tokenizer.path, tiny().tokenizer.sha256, "uint16", TextOptions())
    results = encode_batches(encoder, batches(), 2)
    next(results)
    assert len(taken) <= 2 * 4
    results.close()


@pytest.mark.parametrize("damage", ["gone", "other bytes"])
def test_without_what_was_seen_a_build_does_not_go_on(reference, tmp_path, monkeypatch, damage):
    seen = stopped(reference[0], tmp_path / "out", monkeypatch) / "seen.sqlite"
    seen.unlink()
    if damage == "other bytes":
        seen.write_bytes(b"other" * 1000)
    message = {
        "gone": r"knows 0 documents where the finished shards have \d+",
        "other bytes": r"damaged \(.*\)",
    }
    with pytest.raises(
        DataError, match=rf"seen\.sqlite: {message[damage]}; delete .*partial and start again"
    ):
        build(reference[0], tmp_path / "out")


class Call:
    """What travels to a worker and is a call there, before anything is encoded."""

    def __init__(self, function, argument):
        self._call = function, (argument,)

    def __reduce__(self):
        return self._call


def test_a_worker_that_dies_at_work_ends_the_others_whatever_they_do():
    encoder = Encoder(tiny().tokenizer.path, tiny().tokenizer.sha256, "uint16", TextOptions())
    started = time.monotonic()
    with pytest.raises(DataError, match=r"a worker process ended \(exit code 3; "):
        list(encode_batches(encoder, [[Call(time.sleep, 60)], [Call(os._exit, 3)]], 2))
    assert time.monotonic() - started < 40


def _records(folder, text):
    from roformer_dist.data.records import read_records

    (folder / "one.txt").write_text(text)
    [file] = find_inputs([str(folder / "one.txt")])
    return read_records(0, file, text_column="text", group_by=None)


def test_an_input_that_changes_is_found_and_nothing_is_kept(tmp_path, monkeypatch):
    make_corpus(tmp_path / "corpus")
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "measure_inputs", lambda files, *_: (files, ["0" * 64] * len(files)))
        with pytest.raises(InputChanged, match=r"a\.jsonl: changed while it was being read"):
            build(tmp_path / "corpus", tmp_path / "out")
    assert os.listdir(tmp_path) == ["corpus"]


def test_inputs_without_a_document_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    for text, message in (('{"text": ""}\n', r"\(1 empty\)"), ("", r"\(no line or row\)")):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(DataError, match=f"the inputs hold no document to write {message}"):
            build(tmp_path / "a.jsonl", tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_what_comes_after_the_last_shard_is_counted(tmp_path):
    lines = ['{"text": "one"}', '{"text": "two"}', '{"text": "one"}', "[]"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    manifest = build(
        tmp_path / "a.jsonl", tmp_path / "out", shard_bytes=1, options=TextOptions(on_bad="skip")
    ).manifest
    assert [shard.documents for shard in manifest.shards] == [1, 1]
    counted = {name: manifest.inputs[name] for name in ("records", "duplicates", "skipped")}
    assert counted == {"records": 4, "duplicates": 1, "skipped": {"not an object": 1}}


def test_a_long_text_is_one_document_in_bounded_pieces(tmp_path):
    text = "".join(random.Random(2).choices("abc de\n", k=3_000_000))
    (tmp_path / "long.txt").write_text(text)
    write_shards(find_inputs([str(tmp_path)]), tiny().tokenizer, tmp_path / "out", workers=2)
    store = ShardStore(tmp_path / "out")
    assert len(store) == 1
    assert tiny().tokenizer.decode(store.read(0)) == text


def test_the_closing_figures(reference, tmp_path):
    corpus, texts, folder, _ = reference
    options = ["shards", "--input", corpus, "--tokenizer", tiny().tokenizer.path, "--out", tmp_path / "out"]
    options += ["--shard-mb", SHARD_BYTES / 2**20, "--deduplicate", "--group-by", "repo", "--workers", 1]
    options += ["--on-bad-document", "skip"]
    results = [CliRunner().invoke(app, [*map(str, options), *more]) for more in (["--json"], [])]
    values = json.loads(results[0].stdout)
    store = ShardStore(folder)
    assert values["root"] == store.root
    assert values["groups"] == len(Counter(store.groups[store.groups != 0].tolist())) == 7
    assert values["documents_without_group"] == 1
    assert values["skipped"] == {"not JSON": 1, "empty": 1}
    assert values["ignored_files"] == {".md": 1}
    assert values["records"] == values["documents"] + values["duplicates"] + 2
    assert values["bytes_per_token"] == pytest.approx(
        sum(len(text.encode()) for text in set(texts)) / (store.num_tokens - len(store)), abs=1e-3
    )
    histogram = values["document_lengths"]
    assert sum(octave["count"] for octave in histogram) == len(store)
    assert sum(octave["tokens"] for octave in histogram) == store.num_tokens
    for octave in histogram:
        between = (store.lengths >= octave["from"]) & (store.lengths < octave["below"])
        assert octave["count"] == np.count_nonzero(between), octave
    table = results[1].stdout
    assert "Tokens of a document" in table
    assert "not JSON  1" in table
    assert "reused" in table


@pytest.mark.parametrize("size", ["nan", "inf", "1e308", "0", "-1", "1e-9"])
def test_a_size_of_shards_that_is_none_is_refused(tmp_path, size):
    (tmp_path / "a.txt").write_text("a")
    options = ["--input", tmp_path, "--tokenizer", tiny().tokenizer.path, "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, ["shards", *map(str, options), "--shard-mb", size])
    assert isinstance(result.exception, DataError)
    assert str(result.exception).startswith("--shard-mb ")
    assert not (tmp_path / "out").exists()
