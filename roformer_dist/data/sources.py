"""Where the files of a shards folder are: on a disk of this machine, or behind a URL through the cache."""

from __future__ import annotations

import io
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from roformer_dist.data.cache import CachedFile, ShardCache
from roformer_dist.data.errors import DataError
from roformer_dist.data.manifest import MANIFEST, Shard
from roformer_dist.data.remote import join, read_bytes, sha256_bytes, without_secrets

_OPEN_FILES = 128  # far below what a process may have open, for stores of many sources together
_PREFETCH_THREADS = 2
_PREFETCH_SHARDS = 8


class Source(Protocol):
    """The files of one shards folder; thread-safe. What cannot be read is a ``DataError`` of one line."""

    def where(self, name: str) -> str:
        """The path or URL of a file, for messages."""
        ...

    def manifest(self) -> bytes:
        """The content of ``manifest.json``, unchecked."""
        ...

    def small(self, name: str, sha256: str) -> bytes:
        """The content of a file beside the shards, checked against its hash."""
        ...

    def path(self, name: str, sha256: str) -> Path:
        """A local path of such a file."""
        ...

    def check(self, shard: Shard, *, size: bool) -> None:
        """Raise when the shard is missing or, with ``size``, has another one, as far as that costs nothing."""
        ...

    def read_into(self, buffer: memoryview, shard: Shard, offset: int) -> int:
        """Fill ``buffer`` with a shard's bytes from ``offset`` on, unchecked; how many, fewer where it ends."""
        ...

    def renew(self, shard: Shard) -> bool:
        """After a wrong read: whether another try may get other bytes."""
        ...

    def prefetch(self, shards: Iterable[Shard]) -> None:
        """Begin to bring shards that will be read soon, in this order."""
        ...

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        ...


class LocalSource:
    """A folder. Files stay open, the least recently used are closed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: OrderedDict[str, io.FileIO] = OrderedDict()
        self._lock = threading.Lock()

    def where(self, name: str) -> str:
        return str(self._folder / name)

    def manifest(self) -> bytes:
        path = self._folder / MANIFEST
        if not path.is_file():
            raise DataError(
                f"{self._folder}: no {MANIFEST}, so not a shards folder; write one: roformer-dist data shards"
            )
        return path.read_bytes()

    def small(self, name: str, sha256: str) -> bytes:
        data = self._existing(name).read_bytes()
        if sha256_bytes(data) != sha256:
            raise DataError(
                f"{self.where(name)}: damaged (its sha256 differs from {MANIFEST}); write the shards again"
            )
        return data

    def path(self, name: str, sha256: str) -> Path:
        self.small(name, sha256)
        return self._folder / name

    def check(self, shard: Shard, *, size: bool) -> None:
        found = self._existing(shard.name).stat().st_size
        if size and found != shard.bytes:
            raise DataError(
                f"{self.where(shard.name)}: {found} bytes, {MANIFEST} says {shard.bytes}; "
                "restore it or write the shards again"
            )

    def read_into(self, buffer: memoryview, shard: Shard, offset: int) -> int:
        # Whoever reads holds the file object: dropping it from the table does not close it under them.
        file = self._files.get(shard.name)
        # Until the table is full it does not matter which was used when.
        if file is None or len(self._files) >= _OPEN_FILES:
            file = self._open(shard.name)
        return os.preadv(file.fileno(), (buffer,), offset)

    def renew(self, shard: Shard) -> bool:
        return False

    def prefetch(self, shards: Iterable[Shard]) -> None:
        pass

    def close(self) -> None:
        with self._lock:
            self._files.clear()

    def _open(self, name: str) -> io.FileIO:
        with self._lock:
            file = self._files.get(name)
            if file is None:
                file = self._files[name] = io.FileIO(self._existing(name))
                # A window's shards are read whole, in no order: the system may fetch them in theirs.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
                if len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(name)
            return file

    def _existing(self, name: str) -> Path:
        path = self._folder / name
        if not path.is_file():
            raise DataError(
                f"{path}: missing, though {MANIFEST} lists it; restore it or write the shards again"
            )
        return path


class CachedSource:
    """A folder behind a URL: each file comes whole into the cache of this node and is read there."""

    def __init__(self, url: str, cache: ShardCache) -> None:
        self._url, self._cache = url, cache
        self._files: OrderedDict[str, CachedFile] = OrderedDict()
        self._lock = threading.Lock()
        self._renewal = threading.Lock()
        self._ahead: ThreadPoolExecutor | None = None
        self._coming: set[str] = set()
        self._warned = False

    def where(self, name: str) -> str:
        return without_secrets(join(self._url, name))

    def manifest(self) -> bytes:
        return read_bytes(join(self._url, MANIFEST), self._cache.policy)

    def small(self, name: str, sha256: str) -> bytes:
        return self._cache.read(join(self._url, name), sha256)

    def path(self, name: str, sha256: str) -> Path:
        self.small(name, sha256)
        return self._cache.folder / sha256

    def check(self, shard: Shard, *, size: bool) -> None:
        pass  # the download does

    def read_into(self, buffer: memoryview, shard: Shard, offset: int) -> int:
        file = self._acquire(shard)
        try:
            return file.read_into(buffer, offset)
        finally:
            file.release()

    def renew(self, shard: Shard) -> bool:
        # One after the other: who comes second must not read the file that the first still looks at.
        with self._renewal:
            with self._lock:
                file = self._files.pop(shard.sha256, None)
            if file is None:
                return True  # another thread was first
            if file.damaged_origin:
                return False
            # It may be the one that another thread has got since.
            try:
                whole = file.sha256() == shard.sha256
            except OSError:
                whole = False  # a sector that the disk has lost
            if not whole:
                self._cache.drop(file)
            return True

    def prefetch(self, shards: Iterable[Shard]) -> None:
        with self._lock:
            if self._ahead is None:
                self._ahead = ThreadPoolExecutor(_PREFETCH_THREADS, thread_name_prefix="prefetch")
            for shard in shards:
                if len(self._coming) >= _PREFETCH_SHARDS:
                    break
                if shard.sha256 not in self._coming:
                    self._coming.add(shard.sha256)
                    self._ahead.submit(self._bring, shard)

    def close(self) -> None:
        with self._lock:
            ahead, self._ahead = self._ahead, None
            self._files.clear()
            self._coming.clear()
        if ahead is not None:
            ahead.shutdown(wait=False, cancel_futures=True)

    def _bring(self, shard: Shard) -> None:
        try:
            self._acquire(shard).release()
        except DataError:
            pass  # who reads it will try again and say so
        finally:
            with self._lock:
                self._coming.discard(shard.sha256)

    def _acquire(self, shard: Shard) -> CachedFile:
        with self._lock:
            file = self._files.get(shard.sha256)
            if file is not None:
                self._files.move_to_end(shard.sha256)
        if file is not None:
            if file.acquire():
                return file
            self._warn_evicted(shard)
        # Outside the lock: it may take long, and other shards can be read meanwhile.
        file = self._cache.open(join(self._url, shard.name), shard.sha256, shard.bytes)
        with self._lock:
            self._files[shard.sha256] = file
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return file

    def _warn_evicted(self, shard: Shard) -> None:
        if not self._warned:
            self._warned = True
            logging.getLogger(__name__).warning(
                "cache %s: %s was evicted between two reads and comes again; %d bytes are too few for what is "
                "read side by side, make it larger (data.cache_gb)",
                self._cache.folder,
                shard.name,
                self._cache.max_bytes,
            )
