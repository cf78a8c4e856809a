"""ShardStore: random access to the documents of a shards folder, every byte delivered checked.

The folder's files are described in ``docs/data_format.md``.
"""

from __future__ import annotations

import io
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32

from roformer_dist.data.cache import ShardCache
from roformer_dist.data.errors import DamagedDocument, DataError
from roformer_dist.data.manifest import (
    BLOCK_BYTES,
    BLOCKS_DTYPE,
    INDEX_DTYPE,
    MANIFEST,
    TOKENIZER,
    Manifest,
    Shard,
)
from roformer_dist.data.remote import is_url, without_secrets
from roformer_dist.data.sources import CachedSource, LocalSource, Source

_INDEX_THREADS = 16
_ROOM_BYTES = 2**20  # kept for reads by each thread; longer ones get memory of their own
_READS = 3  # of the same bytes, where a cached file can be had again


class ShardStore:
    """The documents of a shards folder, numbered 0 to ``len(store) - 1``.

    Opening checks the manifest against its root, each index and each file of block checksums against
    its sha256, and each local tar's size. Reading checks the crc32 of every block it takes tokens
    from. So nothing that happens to the files can change a token unseen; what lies outside the
    documents' bytes (tar headers, the JSON members) is not used, and checked by ``verify_shards``.

    Args:
        path: a folder, or its URL in a file system that fsspec knows (``s3://``, ``http://``, ``file://`` …).
        cache: where remote shards are kept on this node; None is ``ShardCache()``. A local path needs none.

    Attributes:
        path: where the folder is, for messages.
        manifest: the folder's ``Manifest``; root: its hash.
        lengths: int64 ``[documents]``, tokens of each document, its EOS included.
        groups: uint64 ``[documents]``, a hash of each document's group; 0 is no group.

    Raises:
        DataError: a file is missing, damaged or of another version, named in the message.
    """

    def __init__(self, path: str | Path, *, cache: ShardCache | None = None) -> None:
        if is_url(path):
            self.path: Path | str = without_secrets(str(path))
            self._source: Source = CachedSource(str(path), cache or ShardCache())
        else:
            self.path = Path(path)
            self._source = LocalSource(self.path)
        self._rooms = threading.local()
        self.manifest = Manifest.parse(self._source.manifest(), self._source.where(MANIFEST))
        self.root = self.manifest.root
        index, self._blocks = self._load_indexes()
        self._offset = np.ascontiguousarray(index["offset"])
        self._bytes = np.ascontiguousarray(index["bytes"])
        self.lengths = index["tokens"].astype(np.int64)
        self.groups = index["group"].astype(np.uint64)
        counts = [shard.documents for shard in self.manifest.shards]
        self._first = np.cumsum([0, *counts])
        self._first_list: list[int] = self._first.tolist()
        blocks = -(-self._bytes.astype(np.int64) // BLOCK_BYTES)
        self._first_block = np.cumsum(blocks) - blocks
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._check_sizes(int(blocks.sum()))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, EOS included."""
        return self.manifest.tokens

    @property
    def tokenizer_path(self) -> Path:
        """The copy of the tokenizer that the shards were written with, checked; ``DataError`` if damaged."""
        return self._source.path(TOKENIZER, self.manifest.tokenizer_sha256)

    def key(self, document: int) -> str:
        """The webdataset key of a document."""
        return f"{document:012d}"

    def where(self, document: int) -> str:
        """Shard and key of a document, in words."""
        shard = self.manifest.shards[bisect_right(self._first_list, document) - 1]
        return f"{self._source.where(shard.name)}: document {self.key(document)}"

    def shard_of(self, documents: np.ndarray) -> np.ndarray:
        """The number of the shard that holds each document, int64, same shape."""
        return np.searchsorted(self._first, documents, side="right") - 1

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
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        total = self.lengths.item(document)
        if start < 0 or (length is not None and length < 0):
            raise IndexError(f"tokens from {start}, {length} of them")
        stop = total if length is None else min(start + length, total)
        if start >= stop:
            return np.empty(0, self._dtype)
        width = self._dtype.itemsize
        first, last = start * width // BLOCK_BYTES, (stop * width - 1) // BLOCK_BYTES
        begin = first * BLOCK_BYTES
        end = min((last + 1) * BLOCK_BYTES, self._bytes.item(document))
        data = self._read_blocks(document, first, begin, end)
        return np.frombuffer(data, self._dtype, count=stop - start, offset=start * width - begin)

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

    def _read_blocks(self, document: int, first: int, begin: int, end: int) -> memoryview:
        """The bytes ``begin`` to ``end`` of a document, which are whole blocks from number ``first``."""
        shard = self.manifest.shards[bisect_right(self._first_list, document) - 1]
        offset = self._offset.item(document) + begin
        room = self._room(end - begin)
        problem = None
        for _ in range(_READS):
            found = self._source.read_into(room, shard, offset)
            problem = self._problem(room[:found], self._first_block.item(document) + first, end - begin)
            if problem is None:
                return room
            if not self._source.renew(shard):
                break
        where = self._source.where(shard.name)
        raise DamagedDocument(
            f"{where}: document {self.key(document)} is damaged ({problem}, {begin} bytes into it or "
            "later); restore the shard or write the shards again",
            document=document,
            shard=where,
            key=self.key(document),
        )

    def _room(self, size: int) -> memoryview:
        """Writable memory of this thread. New memory for each read costs four times what the read does."""
        if size > _ROOM_BYTES:
            return memoryview(bytearray(size))
        if not hasattr(self._rooms, "mine"):
            self._rooms.mine = memoryview(bytearray(_ROOM_BYTES))
        return self._rooms.mine[:size]

    def _problem(self, data: memoryview, block: int, size: int) -> str | None:
        if len(data) != size:
            return f"{len(data)} of {size} bytes"
        for number, at in enumerate(range(0, size, BLOCK_BYTES), start=block):
            actual, expected = crc32(data[at : at + BLOCK_BYTES]), self._blocks.item(number)
            if actual != expected:
                return f"crc32 {actual:08x}, expected {expected:08x}"
        return None

    def _load_indexes(self) -> tuple[np.ndarray, np.ndarray]:
        shards = self.manifest.shards
        if isinstance(self._source, LocalSource):
            loaded = [self._load_index(shard) for shard in shards]
        else:
            with ThreadPoolExecutor(_INDEX_THREADS) as pool:
                loaded = list(pool.map(self._load_index, shards))
        indexes, blocks = zip(*loaded) if loaded else ((), ())
        return (
            np.concatenate([np.empty(0, INDEX_DTYPE), *indexes]),
            np.concatenate([np.empty(0, BLOCKS_DTYPE), *blocks]),
        )

    def _load_index(self, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
        self._source.check(shard)
        index = _array(self._source.small(shard.index_name, shard.index_sha256))
        blocks = _array(self._source.small(shard.blocks_name, shard.blocks_sha256))
        for name, array, dtype in (
            (shard.index_name, index, INDEX_DTYPE),
            (shard.blocks_name, blocks, BLOCKS_DTYPE),
        ):
            if array.dtype != dtype or array.ndim != 1:
                raise DataError(
                    f"{self._source.where(name)}: {array.dtype} {array.shape} instead of {dtype} records; "
                    "write the shards again"
                )
        return index, blocks

    def _check_sizes(self, blocks: int) -> None:
        """What hashes cannot say: that the files were written for each other."""
        manifest = self.manifest
        found = (len(self), int(self.lengths.sum()), int(self._bytes.sum()), blocks)
        width = self._dtype.itemsize
        expected = (manifest.documents, manifest.tokens, manifest.tokens * width, len(self._blocks))
        if found != expected or self._first_list[-1] != len(self):
            raise DataError(
                f"{self.path}: documents, tokens, bytes and blocks of its indexes are {found}, of its {MANIFEST} "
                f"{expected}; write the shards again"
            )


def _array(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


def documents(store: ShardStore) -> Iterator[np.ndarray]:
    """Every document's tokens in order, int64 ``[tokens]`` each; there are ``len(store)``."""
    for document in range(len(store)):
        yield store.read(document)
