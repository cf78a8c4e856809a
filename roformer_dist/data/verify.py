"""Checking every hash of a shards folder, and naming what is wrong by shard and key."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from roformer_dist.data.errors import DataError
from roformer_dist.data.files import sha256_file
from roformer_dist.data.manifest import MANIFEST, TOKENIZER, Manifest, Shard
from roformer_dist.data.remote import download, is_url, join, read_bytes, without_secrets


class _Folder:
    """A shards folder whose files can be had as local ones, one at a time."""

    def __init__(self, path: str | Path) -> None:
        self.remote = is_url(path)
        self._path = path

    def where(self, name: str) -> str:
        """The path or URL of a file, for messages."""
        return without_secrets(join(str(self._path), name)) if self.remote else str(Path(self._path) / name)

    def manifest(self) -> bytes:
        """The content of the manifest; ``DataError`` when there is none."""
        if self.remote:
            return read_bytes(join(str(self._path), MANIFEST))
        path = Path(self._path) / MANIFEST
        if not path.is_file():
            raise DataError(
                f"{self._path}: no {MANIFEST}, so not a shards folder; write one: roformer-dist data shards"
            )
        return path.read_bytes()

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A local path of a file, which may not exist; a downloaded one is gone afterwards."""
        if not self.remote:
            yield Path(self._path) / name
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            download(join(str(self._path), name), path)
            yield path


def verify_shards(path: str | Path) -> Iterator[tuple[str, str | None]]:
    """Check every hash of a shards folder, one file at a time; ``path`` may be a URL.

    Yields:
        ``(what was checked, what is wrong or None)``. A damaged tar is followed by one entry for
        each document in it that fails its crc32, naming the key, or by one that says that none does.
    """
    folder = _Folder(path)
    data = folder.manifest()
    try:
        manifest = Manifest.parse(data, folder.where(MANIFEST))
    except DataError as error:
        yield MANIFEST, str(error)
        return
    yield MANIFEST, None
    yield TOKENIZER, _problem(folder, TOKENIZER, manifest.tokenizer_sha256)
    first = 0
    for shard in manifest.shards:
        yield from _verify_shard(folder, shard, first)
        first += shard.documents


def _verify_shard(folder: _Folder, shard: Shard, first: int) -> Iterator[tuple[str, str | None]]:
    indexed = _problem(folder, shard.index_name, shard.index_sha256)
    yield shard.index_name, indexed
    yield shard.blocks_name, _problem(folder, shard.blocks_name, shard.blocks_sha256)
    try:
        with folder.local(shard.name) as tar:
            problem = _file_problem(folder.where(shard.name), tar, shard.sha256, shard.bytes)
            yield shard.name, problem
            if not problem or indexed or not tar.is_file():
                return
            with folder.local(shard.index_name) as index:
                damaged = list(_damaged_documents(tar, np.load(index, allow_pickle=False), first))
    except DataError as error:
        yield shard.name, str(error)
        return
    where = folder.where(shard.name)
    for key in damaged:
        yield f"{shard.name} {key}", f"{where}: document {key} fails its crc32"
    if not damaged:
        yield shard.name, f"{where}: every document is whole; the damage is in tar headers or JSON members"


def _problem(folder: _Folder, name: str, sha256: str) -> str | None:
    try:
        with folder.local(name) as path:
            return _file_problem(folder.where(name), path, sha256)
    except DataError as error:
        return str(error)


def _file_problem(where: str, path: Path, sha256: str, size: int | None = None) -> str | None:
    if not path.is_file():
        return f"{where}: missing"
    if size is not None and path.stat().st_size != size:
        return f"{where}: {path.stat().st_size} bytes, expected {size}"
    actual = sha256_file(path)
    return None if actual == sha256 else f"{where}: sha256 {actual[:16]}…, expected {sha256[:16]}…"


def _damaged_documents(tar: Path, index: np.ndarray, first: int) -> Iterator[str]:
    """Keys of the documents whose bytes are not those of the index."""
    with open(tar, "rb") as file:
        for number, record in enumerate(index, start=first):
            file.seek(int(record["offset"]))
            if zlib.crc32(file.read(int(record["bytes"]))) != record["crc32"]:
                yield f"{number:012d}"
