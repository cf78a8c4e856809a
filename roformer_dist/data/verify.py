"""Checking every hash of a shards folder, and naming what is wrong by shard and key."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from roformer_dist.data.diagnosis import damaged_documents
from roformer_dist.data.errors import DataError
from roformer_dist.data.files import sha256_file
from roformer_dist.data.manifest import MANIFEST, Manifest, Shard
from roformer_dist.data.remote import download, is_url, join, read_bytes, without_secrets

_UNNAMED = (
    "every document's tokens and headers are as written; the damage is in the words of a JSON member, which "
    "nothing but the tar's sha256 covers"
)


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

    def unlisted(self, manifest: Manifest) -> list[str]:
        """Files that look like a shard's and are none of the manifest's; those behind a URL are not known."""
        if self.remote:
            return []
        listed = {name for s in manifest.shards for name in (s.name, s.index_name, s.blocks_name)}
        return sorted(path.name for path in Path(self._path).glob("shard-*") if path.name not in listed)

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
        ``(what was checked, what is wrong or None)``. A damaged tar is followed by one entry for each
        document in it that is not as written, naming the key, or by one that says that none can be named.
    """
    folder = _Folder(path)
    data = folder.manifest()
    try:
        manifest = Manifest.parse(data, folder.where(MANIFEST))
    except DataError as error:
        yield MANIFEST, str(error)
        return
    yield MANIFEST, None
    yield manifest.tokenizer, _problem(folder, manifest.tokenizer, manifest.tokenizer_sha256)
    first = 0
    for shard in manifest.shards:
        yield from _verify_shard(folder, shard, first)
        first += shard.documents
    for name in folder.unlisted(manifest):
        yield name, f"{folder.where(name)}: {MANIFEST} does not list it, so nothing reads it; remove it"


def _verify_shard(folder: _Folder, shard: Shard, first: int) -> Iterator[tuple[str, str | None]]:
    unknown = []
    for name, sha256 in ((shard.index_name, shard.index_sha256), (shard.blocks_name, shard.blocks_sha256)):
        problem = _problem(folder, name, sha256)
        yield name, problem
        unknown += [name] if problem else []
    where, damaged = folder.where(shard.name), []
    try:
        with folder.local(shard.name) as tar:
            problem = _file_problem(where, tar, shard.sha256, shard.bytes)
            yield shard.name, problem
            if not problem or not tar.is_file():
                return
            index, blocks = (
                None if name in unknown else _array(folder, name)
                for name in (shard.index_name, shard.blocks_name)
            )
            for key, wrong in damaged_documents(tar, first, shard.documents, index, blocks):
                damaged.append(key)
                yield f"{shard.name} {key}".rstrip(), f"{where}: {f'document {key} ' if key else ''}{wrong}"
    except DataError as error:
        yield shard.name, str(error)
        return
    except OSError:
        return  # it may not be opened, which is said already
    if not damaged:
        yield (
            shard.name,
            f"{where}: {_UNNAMED if not unknown else 'with what is left of its index, no key can be named'}",
        )


def _array(folder: _Folder, name: str) -> np.ndarray:
    with folder.local(name) as path:
        return np.load(path, allow_pickle=False)


def _problem(folder: _Folder, name: str, sha256: str) -> str | None:
    try:
        with folder.local(name) as path:
            return _file_problem(folder.where(name), path, sha256)
    except DataError as error:
        return str(error)


def _file_problem(where: str, path: Path, sha256: str, size: int | None = None) -> str | None:
    try:
        if not path.is_file():
            return f"{where}: missing"
        if size is not None and path.stat().st_size != size:
            return f"{where}: {path.stat().st_size} bytes, expected {size}"
        actual = sha256_file(path)
    except OSError as error:
        return f"{where}: cannot be read ({error.strerror})"
    return None if actual == sha256 else f"{where}: sha256 {actual[:16]}…, expected {sha256[:16]}…"
