"""The files of the cache: open ones that are kept while they are read, and what each counts for."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from pathlib import Path

_TOUCH_SECONDS = 1.0
_CHUNK = 2**20


class CachedFile:
    """An open file of the cache. It can be read between ``acquire`` and ``release``; thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._lock = threading.Lock()
        self._readers, self._touched = 0, 0.0

    @property
    def damaged_origin(self) -> bool:
        """Whether the file came like this from its origin: getting it again changes nothing."""
        return self.path.suffix == ".damaged"

    @property
    def size(self) -> int:
        """Its bytes now."""
        return os.fstat(self._file.fileno()).st_size

    def acquire(self) -> bool:
        """Keep the file from being evicted until ``release``; False if it is gone already."""
        descriptor = self._file.fileno()
        with self._lock:
            # The lock belongs to the open file, that is to all threads together.
            if not self._readers:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            if not os.fstat(descriptor).st_nlink:
                if not self._readers:
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
                return False
            self._readers += 1
            now = time.monotonic()
            if now - self._touched > _TOUCH_SECONDS:
                os.utime(descriptor)
                self._touched = now
        return True

    def release(self) -> None:
        """End what ``acquire`` began."""
        with self._lock:
            self._readers -= 1
            if not self._readers:
                fcntl.flock(self._file.fileno(), fcntl.LOCK_UN)

    def same_as(self, path: Path) -> bool:
        """Whether ``path`` is still the name of this file."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def sha256(self) -> str:
        """Hexadecimal sha256 of all its bytes."""
        digest, offset = hashlib.sha256(), 0
        while chunk := self.pread(_CHUNK, offset):
            digest.update(chunk)
            offset += len(chunk)
        return digest.hexdigest()

    def pread(self, size: int, offset: int) -> bytes:
        """``size`` bytes from ``offset``, fewer at the end of the file."""
        return os.pread(self._file.fileno(), size, offset)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill ``buffer`` from ``offset`` on; how many bytes, fewer where the file ends."""
        return os.preadv(self._file.fileno(), [buffer], offset)


def charge(path: Path, stat: os.stat_result) -> int:
    """The bytes that a file counts for: a partial one counts in full, by its name."""
    if path.suffix == ".partial":
        return max(stat.st_size, int(path.suffixes[-2][1:]))
    return stat.st_size


def evict(path: Path) -> bool:
    """Remove a file unless somebody reads or writes it."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
        os.ftruncate(descriptor, 0)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
