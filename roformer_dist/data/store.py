"""ShardStore: random access to the documents of a shards folder, every read checked.

The folder's files are described in ``docs/data_format.md``.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from roformer_dist.data.errors import DataError
from roformer_dist.data.files import read_json, sha256_file, sha256_json

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
FORMAT, VERSION = "roformer_dist.shards", 2
INDEX_DTYPE = np.dtype(
    [("offset", "<u8"), ("bytes", "<u8"), ("tokens", "<u8"), ("crc32", "<u4"), ("group", "<u8")]
)
BLOCK_BYTES = 65_536
BLOCKS_DTYPE = np.dtype("<u4")


@dataclass(frozen=True)
class Shard:
    """One shard as the manifest describes it."""

    name: str
    bytes: int
    sha256: str
    index_sha256: str
    blocks_sha256: str
    documents: int
    tokens: int

    @property
    def index_name(self) -> str:
        """The file name of its index, beside the tar."""
        return self.name.removesuffix(".tar") + ".idx.npy"

    @property
    def blocks_name(self) -> str:
        """The file name of its blocks' checksums, beside the tar."""
        return self.name.removesuffix(".tar") + ".blocks.npy"


@dataclass(frozen=True)
class Manifest:
    """What a shards folder holds; ``root`` is a hash of all of it, contents included."""

    dtype: str
    vocab_size: int
    eos_id: int
    pad_id: int
    mask_id: int
    tokenizer_sha256: str
    inputs: dict[str, Any]
    shard_bytes: int
    documents: int
    tokens: int
    shards: tuple[Shard, ...]

    @property
    def root(self) -> str:
        """sha256 of the canonical JSON of every other field of the file."""
        return sha256_json(self._fields())

    def _fields(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def to_dict(self) -> dict[str, Any]:
        """The content of ``manifest.json``."""
        return {**self._fields(), "root": self.root}

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and check ``folder/manifest.json``; raises ``DataError`` naming the file."""
        path = folder / MANIFEST
        if not path.is_file():
            raise DataError(
                f"{folder}: no {MANIFEST}, so not a shards folder; write one: roformer-dist data shards"
            )
        fields = read_json(path)
        root = fields.pop("root", None)
        if (fields.get("format"), fields.get("version")) != (FORMAT, VERSION):
            raise DataError(
                f"{path}: format {fields.get('format')!r} version {fields.get('version')!r}, this program "
                f"reads {FORMAT!r} version {VERSION}; write the shards again"
            )
        if sha256_json(fields) != root:
            raise DataError(f"{path}: its content does not match its root {root}; write the shards again")
        del fields["format"], fields["version"]
        fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
        return cls(**fields)


class ShardStore:
    """The documents of a shards folder, numbered 0 to ``len(store) - 1``.

    Opening checks the manifest against its root, each index against its sha256 and each tar's size;
    reading checks the document's crc32. Reads are thread-safe.

    Attributes:
        manifest: the folder's ``Manifest``; root: its hash.
        lengths: int64 ``[documents]``, tokens of each document, its EOS included.
        groups: uint64 ``[documents]``, a hash of each document's group; 0 is no group.

    Raises:
        DataError: a file is missing, damaged or of another version, named in the message.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = Manifest.load(self.path)
        self.root = self.manifest.root
        indexes = [self._load_index(shard) for shard in self.manifest.shards]
        self._index = np.concatenate(indexes) if indexes else np.empty(0, INDEX_DTYPE)
        self._first = np.cumsum([0] + [shard.documents for shard in self.manifest.shards])
        self.lengths = self._index["tokens"].astype(np.int64)
        self.groups = self._index["group"].astype(np.uint64)
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, EOS included."""
        return self.manifest.tokens

    @property
    def tokenizer_path(self) -> Path:
        """The copy of the tokenizer that the shards were written with."""
        return self.path / TOKENIZER

    def key(self, document: int) -> str:
        """The webdataset key of a document."""
        return f"{document:012d}"

    def read(self, document: int) -> np.ndarray:
        """The tokens of one document, int64 ``[tokens]``, its EOS included.

        Raises:
            DataError: the bytes on disk do not match the index; names the shard and the key.
            IndexError: there is no such document.
        """
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        number = int(np.searchsorted(self._first, document, side="right")) - 1
        offset, size, _, crc, _ = (int(value) for value in self._index[document])
        data = os.pread(self._open(number), size, offset)
        if len(data) != size or zlib.crc32(data) != crc:
            shard = self.path / self.manifest.shards[number].name
            raise DataError(
                f"{shard}: document {self.key(document)} is damaged ({len(data)} of {size} bytes, crc32 "
                f"{zlib.crc32(data):08x}, expected {crc:08x}); restore the shard or write the shards again"
            )
        return np.frombuffer(data, dtype=self._dtype).astype(np.int64)

    def close(self) -> None:
        """Close the shard files; a later read opens them again."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def __enter__(self) -> ShardStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()

    def _open(self, number: int) -> int:
        with self._lock:
            if number not in self._files:
                self._files[number] = os.open(self.path / self.manifest.shards[number].name, os.O_RDONLY)
            return self._files[number]

    def _load_index(self, shard: Shard) -> np.ndarray:
        tar, path = self.path / shard.name, self.path / shard.index_name
        blocks = self.path / shard.blocks_name
        for file in (tar, path, blocks):
            if not file.is_file():
                raise DataError(
                    f"{file}: missing, though {MANIFEST} lists it; restore it or write the shards again"
                )
        if tar.stat().st_size != shard.bytes:
            raise DataError(
                f"{tar}: {tar.stat().st_size} bytes, {MANIFEST} says {shard.bytes}; "
                "restore it or write the shards again"
            )
        for file, sha256 in ((path, shard.index_sha256), (blocks, shard.blocks_sha256)):
            if sha256_file(file) != sha256:
                raise DataError(
                    f"{file}: damaged (its sha256 differs from {MANIFEST}); write the shards again"
                )
        index = np.load(path, allow_pickle=False)
        if index.dtype != INDEX_DTYPE or index.shape != (shard.documents,):
            raise DataError(
                f"{path}: {index.dtype} {index.shape} instead of {shard.documents} records; "
                "write the shards again"
            )
        return index


def documents(store: ShardStore) -> Iterator[np.ndarray]:
    """Every document's tokens in order, int64 ``[tokens]`` each; there are ``len(store)``."""
    for document in range(len(store)):
        yield store.read(document)


def verify_shards(path: str | Path) -> Iterator[tuple[str, str | None]]:
    """Check every hash of a shards folder, one file at a time.

    Yields:
        ``(what was checked, what is wrong or None)``. A damaged tar is followed by one entry for
        each document in it that fails its crc32, naming the key.
    """
    folder = Path(path)
    try:
        manifest = Manifest.load(folder)
    except DataError as error:
        if not (folder / MANIFEST).is_file():
            raise
        yield MANIFEST, str(error)
        return
    yield MANIFEST, None
    tokenizer = folder / TOKENIZER
    good = tokenizer.is_file() and sha256_file(tokenizer) == manifest.tokenizer_sha256
    yield TOKENIZER, None if good else f"{tokenizer}: missing or its sha256 differs from {MANIFEST}"
    first = 0
    for shard in manifest.shards:
        indexed = _file_problem(folder / shard.index_name, None, shard.index_sha256)
        yield shard.index_name, indexed
        yield shard.blocks_name, _file_problem(folder / shard.blocks_name, None, shard.blocks_sha256)
        problem = _file_problem(folder / shard.name, shard.bytes, shard.sha256)
        yield shard.name, problem
        if problem and not indexed and (folder / shard.name).is_file():
            yield from _damaged_documents(folder, shard, first)
        first += shard.documents


def _file_problem(path: Path, size: int | None, sha256: str) -> str | None:
    if not path.is_file():
        return f"{path}: missing"
    if size is not None and path.stat().st_size != size:
        return f"{path}: {path.stat().st_size} bytes, expected {size}"
    actual = sha256_file(path)
    return None if actual == sha256 else f"{path}: sha256 {actual[:16]}…, expected {sha256[:16]}…"


def _damaged_documents(folder: Path, shard: Shard, first: int) -> Iterator[tuple[str, str]]:
    index = np.load(folder / shard.index_name, allow_pickle=False)
    with open(folder / shard.name, "rb") as file:
        for number, (offset, size, _, crc, _) in enumerate(index.tolist(), start=first):
            file.seek(offset)
            if zlib.crc32(file.read(size)) != crc:
                key = f"{number:012d}"
                yield f"{shard.name} {key}", f"{folder / shard.name}: document {key} fails its crc32"
