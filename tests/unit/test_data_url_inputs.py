"""Shards and tokenizers made of texts behind URLs: the bytes are those of texts on the disk."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from buckets import bucket, fsspec_finds
from test_data_tiny import tiny
from typer.testing import CliRunner

from data_tools.app import app
from roformer_dist.data.documents import TextOptions, read_texts
from roformer_dist.data.inputs import find_inputs

REFUSED = {"forbidden.txt": 403, "busy.txt": 503}


class Handler(SimpleHTTPRequestHandler):
    """Python's own server of a folder, with listings; the names in ``REFUSED`` are answered with their status."""

    def send_head(self) -> Any:
        status = REFUSED.get(self.path.rpartition("/")[2])
        return self.send_error(status) if status else super().send_head()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder ``texts`` with a folder in it; a name that a URL writes and sorts otherwise."""
    folder = tmp_path_factory.mktemp("inputs") / "texts"
    (folder / "more").mkdir(parents=True)
    for number, file in enumerate(tiny().files[:6]):
        name = ("\u00e9 b.txt", "c.txt", "more/d.txt")[number] if number < 3 else f"more/{number}.txt"
        with file.local() as path:
            shutil.copyfile(path, folder / name)
    return folder


@pytest.fixture(scope="module")
def web(texts: Path) -> Iterator[str]:
    with web_server(texts.parent) as url:
        yield url


@pytest.fixture(scope="module")
def s3(texts: Path) -> Iterator[str]:
    with bucket("inputs", texts) as endpoint, fsspec_finds(endpoint):
        yield "s3://inputs"


def command(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if code and result.exception and not isinstance(result.exception, SystemExit):
        return str(result.exception)  # what the entry point makes one line and exit code 2 of
    assert result.exit_code == code, result.output
    return result.output


def build(source: object, out: Path) -> dict[str, bytes]:
    """The files of the shards folder that the command writes."""
    command("shards", "--input", source, "--tokenizer", tiny().tokenizer.path, "--out", out, "--workers", 2)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("where", ["web", "s3"])
def test_shards_of_texts_behind_urls_are_those_of_the_disk(
    texts: Path, where: str, request: pytest.FixtureRequest, tmp_path: Path
):
    expected = build(texts, tmp_path / "disk")
    assert build(f"{request.getfixturevalue(where)}/texts", tmp_path / "url") == expected
    model = tmp_path / "{}.model"
    for name, source in (("disk", texts), ("url", f"{request.getfixturevalue(where)}/texts")):
        out = str(model).format(name)
        command("tokenizer", "--input", source, "--vocab-size", 300, "--out", out)
    assert (tmp_path / "disk.model").read_bytes() == (tmp_path / "url.model").read_bytes()


def test_one_file_behind_a_url_is_an_input(texts: Path, web: str, tmp_path: Path):
    expected = build(texts / "more" / "d.txt", tmp_path / "disk")
    assert build(f"{web}/texts/more/d.txt", tmp_path / "url") == expected
    # What signs a URL is no part of its name.
    (plain,), (signed,) = (
        find_inputs([f"{web}/texts/more/d.txt{query}"]) for query in ("", "?signature=a/b")
    )
    assert (signed.name, signed.folder, signed.kind) == (plain.name, plain.folder, "text")
    assert [*read_texts([signed], TextOptions())] == [*read_texts([plain], TextOptions())]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.txt", "no such file or folder"),
        ("forbidden.txt", "cannot be read (403"),
        ("busy.txt", "cannot be read (503"),
    ],
)
def test_what_a_web_server_refuses_is_said(web: str, tmp_path: Path, name: str, message: str):
    url = f"{web}/texts/{name}"
    said = command(
        "shards", "--input", url, "--tokenizer", tiny().tokenizer.path, "--out", tmp_path / "out", code=2
    )
    assert said.startswith(f"--input {url}: {message}")
    assert "\n" not in said
    assert not (tmp_path / "out").exists()


def test_a_server_that_is_not_there_is_said(tmp_path: Path):
    url = "http://127.0.0.1:9/texts/a.txt"
    said = command(
        "shards", "--input", url, "--tokenizer", tiny().tokenizer.path, "--out", tmp_path / "out", code=2
    )
    assert said.startswith(f"--input {url}: cannot be read (Cannot connect to host 127.0.0.1:9")
