"""Reading text inputs, hashing, and writing files and folders all at once or not at all."""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from roformer_dist.data.errors import DataError

UTF8, STRICT, REPLACE = "utf-8", "strict", "replace"


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hexadecimal sha256 of the canonical JSON of ``value``: sorted keys, no spaces, ASCII."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object stored in ``path``; raises ``DataError`` when it is not a JSON object."""
    return parse_json(path.read_bytes(), str(path))


def parse_json(data: bytes, path: str) -> dict[str, Any]:
    """The JSON object ``data``; raises ``DataError`` naming ``path`` when it is not one."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); the file is damaged, build it again") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}; build it again")
    return value


def json_bytes(value: Any) -> bytes:
    """Readable JSON for a file: two spaces of indent, sorted keys, a final newline."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears as ``path`` only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that appears as ``path`` only when the block ends without an error.

    ``path`` must be absent or empty: nothing that exists is ever replaced.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{path}: exists and is not an empty folder; choose another --out or delete it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for entry in sorted(partial.rglob("*")):
            _sync_folder(entry) if entry.is_dir() else _sync_file(entry)
        _sync_folder(partial)
        os.rename(partial, path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class TextFile:
    """One text document on disk; ``name`` is relative to the input it was found under.

    Attributes:
        encoding: a codec that Python knows.
        errors: ``strict`` stops at bytes that the codec does not know, ``replace`` writes U+FFFD for them.
    """

    name: str
    path: Path
    encoding: str = UTF8
    errors: str = STRICT

    def read(self) -> str:
        """The exact text (no newline translation, a byte order mark kept); ``DataError`` if undecodable."""
        try:
            return self.path.read_bytes().decode(self.encoding, self.errors)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path}: not {self.encoding.upper()} at byte {error.start}; name the files' own with --encoding "
                "(such as latin-1), or give --errors replace to write U+FFFD for such bytes"
            ) from None

    @property
    def fingerprint(self) -> list[str]:
        """Everything that decides the text: name, sha256, and the decoding where it is not the default."""
        own = [] if (self.encoding, self.errors) == (UTF8, STRICT) else [self.encoding, self.errors]
        return [self.name, sha256_file(self.path), *own]


def text_files(inputs: Sequence[str], *, encoding: str = UTF8, errors: str = STRICT) -> list[TextFile]:
    """The documents that ``inputs`` name, each once: .txt files, folders (searched deeply) or globs.

    Inputs keep their order and the files of one input are sorted by name, so the result does not
    depend on the file system. Raises ``DataError`` for an input that names no .txt file, and for a
    decoding that does not exist.
    """
    if errors not in (STRICT, REPLACE):
        raise DataError(f"--errors {errors}: choose {STRICT} or {REPLACE}")
    try:
        encoding = codecs.lookup(encoding).name
    except LookupError:
        raise DataError(f"--encoding {encoding}: no such encoding; utf-8, latin-1, cp1252 are some") from None
    found: dict[Path, TextFile] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            files = [TextFile(p.relative_to(path).as_posix(), p) for p in path.rglob("*.txt") if p.is_file()]
        elif path.is_file():
            files = [TextFile(path.name, path)]
        else:
            matches = [Path(match) for match in glob.glob(text, recursive=True)]
            files = [TextFile(p.name, p) for p in matches if p.is_file() and p.suffix == ".txt"]
        if not files:
            raise DataError(f"--input {text}: no .txt file found; give a .txt file, a folder or a glob")
        for file in sorted(files, key=lambda file: (file.name, str(file.path))):
            found.setdefault(file.path.resolve(), replace(file, encoding=encoding, errors=errors))
    if not found:
        raise DataError("no input was given; name at least one .txt file, folder or glob")
    return list(found.values())
