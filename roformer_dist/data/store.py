"""ShardStore: random access to the documents of a shards folder, every byte delivered checked.

The folder's files are described in ``docs/data_format.md``.
"""

from __future__ import annotations

import errno
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from isal.isal_zlib import crc32

from roformer_dist.data.cache import ShardCache
from roformer_dist.data.errors import DamagedDocument, DataError
from roformer_dist.data.index import ShardIndex, load_index
from roformer_dist.data.manifest import BLOCK_BYTES, MANIFEST, Manifest
from roformer_dist.data.remote import is_url, without_secrets
from roformer_dist.data.sources import CachedSource, LocalSource, Source

# A folder of more is checked shard by shard as it is read, so that opening it takes no time and no memory.
WHOLE_DOCUMENTS = 2_000_000
# What is kept of such a folder: the indexes of as many shards as windows commonly have, or more where they are small.
_INDEXES, _INDEX_MEMORY, _DOCUMENT_MEMORY = 256, 2**30, 64
_INDEX_THREADS = 16
_ROOM_BYTES = 2**20  # kept for reads by each thread; longer ones get memory of their own
_READS = 3  # of the same bytes, where a cached file can be had again

T = TypeVar("T")


class _Rooms(threading.local):
    """Memory for reads, of each thread its own."""

    def __init__(self) -> None:
        self.mine = memoryview(bytearray(_ROOM_BYTES))


class ShardStore:
    """The documents of a shards folder, numbered 0 to ``len(store) - 1``.

    Opening checks the manifest against its root and each local tar's size, and each index and file of
    block checksums against its sha256: of all shards, or, where there are more than ``WHOLE_DOCUMENTS``
    documents, of each shard when it is first read. Reading checks the crc32 of every block it takes
    tokens from. So nothing that happens to the files can change a token unseen; what lies outside the
    documents' bytes (tar headers, the JSON members) is not used, and checked by ``verify_shards``.

    Args:
        path: a folder, or its URL in a file system that fsspec knows (``s3://``, ``http://``, ``file://`` …).
        cache: where remote shards are kept on this node; None is ``ShardCache()``. A local path needs none.
        check_sizes: refuse a local tar of another size at once; without, documents that it has lost are
            found when they are read, as they are behind a URL.

    Attributes:
        path: where the folder is, for messages.
        manifest: the folder's ``Manifest``; root: its hash.

    Raises:
        DataError: a file is missing, damaged or of another version, named in the message.
    """

    def __init__(
        self, path: str | Path, *, cache: ShardCache | None = None, check_sizes: bool = True
    ) -> None:
        if is_url(path):
            self.path: Path | str = without_secrets(str(path))
            self._source: Source = CachedSource(str(path), cache or ShardCache())
        else:
            self.path = Path(path)
            self._source = LocalSource(self.path)
        self._rooms = _Rooms()
        self.manifest = Manifest.parse(self._source.manifest(), self._source.where(MANIFEST))
        self.root = self.manifest.root
        counts = [shard.documents for shard in self.manifest.shards]
        self._firsts = np.cumsum([0, *counts])
        self._first: list[int] = self._firsts.tolist()  # bisect is quicker with a list
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._check_counts()
        for shard in self.manifest.shards:
            self._source.check(shard, size=check_sizes)
        self._of_all = lru_cache(self._read_all)
        whole = len(self) <= WHOLE_DOCUMENTS
        # Of all shards alike; a document takes 44 bytes and 4 for each block.
        fit = _INDEX_MEMORY * len(self.manifest.shards) // (_DOCUMENT_MEMORY * max(1, len(self)))
        self._index = lru_cache(maxsize=None if whole else max(_INDEXES, fit))(self._load_index)
        if whole:
            self._all_indexes(self._index)

    def __len__(self) -> int:
        return self._first[-1]

    @property
    def lengths(self) -> np.ndarray:
        """int64 ``[documents]``, tokens of each document, its EOS included; takes every index to know."""
        return self._of_all("tokens", np.int64)

    @property
    def groups(self) -> np.ndarray:
        """uint64 ``[documents]``, a hash of each document's group, 0 for none; takes every index to know."""
        return self._of_all("group", np.uint64)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, EOS included."""
        return self.manifest.tokens

    @property
    def tokenizer_path(self) -> Path:
        """The copy of the tokenizer that the shards were written with, checked; ``DataError`` if damaged."""
        return self._source.path(self.manifest.tokenizer, self.manifest.tokenizer_sha256)

    def key(self, document: int) -> str:
        """The webdataset key of a document."""
        return f"{document:012d}"

    def where(self, document: int) -> str:
        """Shard and key of a document, in words."""
        shard = self.manifest.shards[bisect_right(self._first, document) - 1]
        return f"{self._source.where(shard.name)}: document {self.key(document)}"

    def shard_of(self, documents: np.ndarray) -> np.ndarray:
        """The number of the shard that holds each document, int64, same shape."""
        return np.searchsorted(self._firsts, documents, side="right") - 1

    def read(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens ``start`` to ``start + length - 1`` of a document, int64; what lies past its end is left out.

        Only the blocks that hold them are read, and each is checked. None reads to the document's end.

        Raises:
            DamagedDocument: the bytes are not those that were written; names the shard and the key.
            DataError: the shard cannot be read or downloaded.
            IndexError: there is no such document.
        """
        return self.read_stored(document, start, length).astype(np.int64)

    def read_stored(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """As ``read``, in the integers of the file (uint16 or uint32) and without a copy.

        They are good until the same thread reads again: the memory is used for its next read.
        """
        if not 0 <= document < self._first[-1]:
            raise IndexError(f"document {document} of {len(self)}")
        if start < 0 or (length is not None and length < 0):
            raise IndexError(f"tokens from {start}, {length} of them")
        index = self._index(bisect_right(self._first, document) - 1)
        inside = document - index.first
        total = index.tokens.item(inside)
        stop = total if length is None else min(start + length, total)
        if start >= stop:
            return np.empty(0, self._dtype)
        width = self._dtype.itemsize
        first = start * width // BLOCK_BYTES
        begin, end = first * BLOCK_BYTES, -(-stop * width // BLOCK_BYTES) * BLOCK_BYTES
        room = self._room(min(end, total * width) - begin)
        if problem := self._fill(room, index, inside, first):
            self._read_again(problem, room, index, inside, first)
        return np.frombuffer(room, self._dtype, stop - start, start * width - begin)

    @property
    def is_remote(self) -> bool:
        """Whether shards are downloaded, so that ``prefetch`` does something."""
        return isinstance(self._source, CachedSource)

    def prefetch(self, documents: Iterable[int] | np.ndarray) -> None:
        """Say which documents are read next, in order: their shards are downloaded ahead, a few at a time."""
        if not self.is_remote:
            return
        numbers = self.shard_of(np.asarray(documents, dtype=np.int64)).tolist()
        self._source.prefetch(self.manifest.shards[number] for number in dict.fromkeys(numbers))

    def close(self) -> None:
        """Close the shard files; a later read opens them again."""
        self._source.close()

    def __enter__(self) -> ShardStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_again(
        self, problem: str | None, room: memoryview, index: ShardIndex, inside: int, first: int
    ) -> None:
        """Fill ``room`` with a document's blocks from number ``first`` on, where the file can be had again."""
        begin = first * BLOCK_BYTES
        for _ in range(_READS - 1):
            if not self._source.renew(index.shard):
                break
            problem = self._fill(room, index, inside, first)
            if problem is None:
                return
        where, document = self._source.where(index.shard.name), index.first + inside
        raise DamagedDocument(
            f"{where}: document {self.key(document)} is damaged ({problem}, {begin} bytes into it or "
            "later); restore the shard or write the shards again",
            document=document,
            shard=where,
            key=self.key(document),
        )

    def _fill(self, room: memoryview, index: ShardIndex, inside: int, first: int) -> str | None:
        """Read a document's blocks from number ``first`` on into ``room``; what is wrong with them, or None."""
        try:
            found = self._source.read_into(room, index.shard, index.offset.item(inside) + first * BLOCK_BYTES)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return str(error.strerror)  # a disk that has lost a sector says so of every read there
        return _problem(room, found, index.blocks, index.first_block.item(inside) + first)

    def _room(self, size: int) -> memoryview:
        """Writable memory of this thread. New memory for each read costs four times what the read does."""
        if size > _ROOM_BYTES:
            return memoryview(bytearray(size))
        return self._rooms.mine[:size]

    def _load_index(self, number: int) -> ShardIndex:
        shard = self.manifest.shards[number]
        return load_index(self._source, shard, self._first[number], self._dtype.itemsize)

    def _all_indexes(self, load: Callable[[int], T]) -> list[T]:
        numbers = range(len(self.manifest.shards))
        if not self.is_remote:
            return [load(number) for number in numbers]
        with ThreadPoolExecutor(_INDEX_THREADS) as pool:
            return list(pool.map(load, numbers))

    def _read_all(self, field: str, dtype: type[np.number]) -> np.ndarray:
        # Of a large folder, the indexes that are kept are left alone.
        load = self._index if len(self) <= WHOLE_DOCUMENTS else self._load_index
        fields = self._all_indexes(lambda number: load(number).records[field].astype(dtype))
        return np.concatenate([np.empty(0, dtype), *fields])

    def _check_counts(self) -> None:
        manifest = self.manifest
        found = (self._first[-1], sum(shard.tokens for shard in manifest.shards))
        if found != (manifest.documents, manifest.tokens):
            raise DataError(
                f"{self.path}: documents and tokens of its shards are {found}, of its {MANIFEST} "
                f"{(manifest.documents, manifest.tokens)}; write the shards again"
            )


def _problem(room: memoryview, found: int, blocks: np.ndarray, block: int) -> str | None:
    """What is wrong with ``found`` bytes that were read into ``room``, whole blocks from number ``block``."""
    size = len(room)
    if found != size:
        return f"{found} of {size} bytes"
    for at in range(0, size, BLOCK_BYTES):
        actual = crc32(room[at : at + BLOCK_BYTES])
        if actual != blocks.item(block):
            return f"crc32 {actual:08x}, expected {blocks.item(block):08x}"
        block += 1
    return None


def documents(store: ShardStore, *, most_tokens: int | None = None) -> Iterator[np.ndarray]:
    """Documents in order, int64 ``[tokens]`` each: all, or evenly spaced ones of about ``most_tokens`` together."""
    step = 1 if most_tokens is None else max(1, -(-store.num_tokens // most_tokens))
    for document in range(0, len(store), step):
        yield store.read(document, 0, most_tokens)
