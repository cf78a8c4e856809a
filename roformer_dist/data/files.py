"""Hashing, JSON, and writing files and folders all at once or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from roformer_dist.data.errors import DataError


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
        sync_folder(path.parent)
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
            sync_folder(entry) if entry.is_dir() else _sync_file(entry)
        sync_folder(partial)
        os.rename(partial, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Put the names in a folder on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
