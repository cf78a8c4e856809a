"""Hashing, JSON, and writing files and folders all at once or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from roformer_dist.data.errors import DataError

# What the system says when a file cannot grow any more.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
def writing(path: str | Path, more: str = "") -> Iterator[None]:
    """Turn a disk that is full into one line that names ``path`` and the fix, and says ``more``."""
    try:
        yield
    except sqlite3.OperationalError as error:
        reason, fix = str(error), "free space there or choose another --out"
    except OSError as error:
        if error.errno not in FULL:
            raise
        reason, fix = str(error.strerror), "free space there or choose another --out"
        if error.errno == errno.EFBIG:
            fix = "raise the limit on the size of a file (ulimit -f)"
    else:
        return
    raise DataError(f"{path}: cannot be written ({reason}); {fix}{more}")


def check_file_out(path: Path, example: str) -> None:
    """Raise ``DataError`` when ``--out`` is a folder where a file is to be written, before any work."""
    _check_parents(path)
    if path.is_dir():
        raise DataError(f"--out {path}: is a folder; name the file to write, such as {path / example}")


def _check_parents(path: Path) -> None:
    there = next((parent for parent in path.parents if parent.exists()), path)
    if there.is_file():
        raise DataError(
            f"--out {path}: {there} is a file, so there can be nothing in it; choose another --out"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise DataError(
            f"--out {path}: nothing can be written in {there} (no permission, or a file system that is mounted "
            "read-only); choose another --out"
        )


def check_folder_out(path: Path) -> None:
    """Raise ``DataError`` when ``--out`` is not absent or an empty folder."""
    _check_parents(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{path}: exists and is not an empty folder; choose another --out or delete it")


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
    check_folder_out(path)
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
