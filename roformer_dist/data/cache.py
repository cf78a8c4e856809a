"""A cache of remote files, shared by the processes of a node: named by content, bounded, evicting the oldest.

What a file's name promises was checked when it was downloaded. Later damage to the cache is found by
whoever reads (the store checks each block), who then drops the file and gets it again. That guards
against accidents, not against somebody who may write to the folder.

Two kinds of locks, both released by the kernel when a process dies:

- ``filelock`` on files in ``locks/``: one download of a file at a time, one change of the folder at a time.
- ``flock`` on a cached file itself: shared while it is read, exclusive while it is written. Only a file on
  which nobody holds one is evicted; it is also emptied, so that its space is free at once.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from pathlib import Path

from roformer_dist.data.errors import DataError
from roformer_dist.data.remote import RetryPolicy, download, sha256_bytes, without_secrets

GIB = 2**30
_TOUCH_SECONDS = 1.0
_POLL_SECONDS = 0.05


def default_folder() -> Path:
    """Where the cache is unless chosen: ``$XDG_CACHE_HOME/roformer_dist``, usually below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "roformer_dist"


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

    def pread(self, size: int, offset: int) -> bytes:
        """``size`` bytes from ``offset``, fewer at the end of the file."""
        return os.pread(self._file.fileno(), size, offset)


class ShardCache:
    """Remote files on a local disk of this node.

    Args:
        folder: made when absent; must be on a file system with ``flock`` (a local one). All processes of
            the node share it, of other trainings too. None is ``default_folder()``.
        max_bytes: what all files together may take, those being downloaded included.
        policy: how long to insist on a download.

    Raises:
        DataError: a folder that cannot be made, or a size below one byte.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        max_bytes: int = 64 * GIB,
        policy: RetryPolicy = RetryPolicy(),  # noqa: B008
    ) -> None:
        if max_bytes < 1:
            raise DataError(
                f"a cache of {max_bytes} bytes holds nothing; give at least the largest shard's size"
            )
        self.folder, self.max_bytes, self.policy = Path(folder or default_folder()), max_bytes, policy
        self.downloads = 0
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cache {self.folder}: {error.strerror}; choose another folder") from None
        with self._mutex("folder"):
            # The origin may have been repaired since.
            for path in self.folder.glob("*.damaged"):
                _evict(path)

    def open(self, url: str, sha256: str, size: int) -> CachedFile:
        """The file with this hash, acquired; downloaded from ``url`` when it is not there.

        Raises:
            DataError: it cannot be downloaded, or does not fit into the cache.
        """
        if size > self.max_bytes:
            raise DataError(
                f"{without_secrets(url)}: {size} bytes, more than the whole cache may hold "
                f"({self.max_bytes}); make the cache larger (data.cache_gb)"
            )
        asked = time.time()
        while True:
            if file := self._find(sha256, size):
                return file
            with self._mutex(sha256[:2]):
                if file := self._find(sha256, size):
                    return file
                self._raise_failure_since(asked, sha256)
                try:
                    self._fetch(url, sha256, size)
                except DataError as error:
                    self._failure(sha256).write_text(str(error))
                    raise
                if file := self._find(sha256, size):
                    return file

    def read(self, url: str, sha256: str) -> bytes:
        """The content of a small file with this hash, checked.

        Raises:
            DataError: it cannot be downloaded, or its origin has another content.
        """
        asked = time.time()
        if (data := self._content(sha256)) is not None:
            return data
        with self._mutex(sha256[:2]):
            if (data := self._content(sha256)) is not None:
                return data
            self._raise_failure_since(asked, sha256)
            try:
                return self._fetch_small(url, sha256)
            except DataError as error:
                self._failure(sha256).write_text(str(error))
                raise

    def drop(self, file: CachedFile) -> None:
        """Forget a file that turned out to be damaged; who reads it goes on reading what it has."""
        with self._mutex("folder"):
            try:
                if os.path.samestat(os.stat(file.path), os.fstat(file._file.fileno())):
                    file.path.unlink()
            except FileNotFoundError:
                pass  # another process was first

    def used_bytes(self) -> int:
        """What the files take, with the full size of those that are being downloaded."""
        return sum(_charge(path, stat) for path, stat in self._files())

    def _find(self, sha256: str, size: int) -> CachedFile | None:
        for name in (sha256, f"{sha256}.damaged"):
            try:
                file = CachedFile(self.folder / name)
            except FileNotFoundError:
                continue
            if not file.acquire():
                continue
            if file.size == size:
                return file
            file.release()
            self.drop(file)
        return None

    def _content(self, sha256: str) -> bytes | None:
        try:
            file = CachedFile(self.folder / sha256)
        except FileNotFoundError:
            return None
        if not file.acquire():
            return None
        try:
            data = file.pread(file.size, 0)
        finally:
            file.release()
        if sha256_bytes(data) == sha256:
            return data
        self.drop(file)
        return None

    def _fetch(self, url: str, sha256: str, size: int) -> None:
        partial, lock = self._reserve(sha256, size)
        try:
            intact = download(url, partial, sha256=sha256, size=size, policy=self.policy)
            self.downloads += 1
            self._publish(partial, sha256 if intact else f"{sha256}.damaged")
        finally:
            partial.unlink(missing_ok=True)
            os.close(lock)

    def _fetch_small(self, url: str, sha256: str) -> bytes:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "file"
            if not download(url, file, sha256=sha256, policy=self.policy):
                raise DataError(
                    f"{without_secrets(url)}: damaged (its sha256 is not the one expected); upload it again"
                )
            data = file.read_bytes()
        partial, lock = self._reserve(sha256, len(data))
        try:
            partial.write_bytes(data)
            self._publish(partial, sha256)
        finally:
            partial.unlink(missing_ok=True)
            os.close(lock)
        return data

    def _publish(self, partial: Path, name: str) -> None:
        with self._mutex("folder"):
            os.replace(partial, self.folder / name)

    def _reserve(self, sha256: str, size: int) -> tuple[Path, int]:
        """An empty file to download into and the descriptor that keeps it, once there is room for ``size``."""
        partial = self.folder / f"{sha256}.{size}.partial"
        deadline = time.monotonic() + self.policy.give_up
        while True:
            with self._mutex("folder"):
                held = self._make_room(size)
                if held + size <= self.max_bytes:
                    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                    return partial, descriptor
            if time.monotonic() > deadline:
                raise DataError(
                    f"cache {self.folder}: {held} of {self.max_bytes} bytes are being read or downloaded, and "
                    f"{size} more are needed since {self.policy.give_up:g} s; make it larger (data.cache_gb)"
                )
            time.sleep(_POLL_SECONDS)

    def _make_room(self, size: int) -> int:
        """Evict the least recently used until ``size`` fits or all that is left is in use; bytes left."""
        files = sorted(self._files(), key=lambda item: item[1].st_mtime_ns)
        held = sum(_charge(path, stat) for path, stat in files)
        for path, stat in files:
            # What a killed process left of a download is of no use, whether there is room or not.
            if (held + size > self.max_bytes or path.suffix == ".partial") and _evict(path):
                held -= _charge(path, stat)
        return held

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for entry in os.scandir(self.folder):
            try:
                if entry.is_file():
                    found.append((Path(entry.path), entry.stat()))
            except FileNotFoundError:
                pass  # evicted meanwhile
        return found

    def _mutex(self, name: str):
        from filelock import FileLock

        return FileLock(self.folder / "locks" / f"{name}.lock")

    def _failure(self, sha256: str) -> Path:
        return self.folder / "locks" / f"{sha256}.failed"

    def _raise_failure_since(self, asked: float, sha256: str) -> None:
        """Who waited for a download that failed fails with it: in turn, the waits would add up."""
        failure = self._failure(sha256)
        try:
            if failure.stat().st_mtime >= asked:
                raise DataError(failure.read_text())
        except FileNotFoundError:
            pass


def _charge(path: Path, stat: os.stat_result) -> int:
    """The bytes that a file counts for: a partial one counts in full, by its name."""
    if path.suffix == ".partial":
        return max(stat.st_size, int(path.suffixes[-2][1:]))
    return stat.st_size


def _evict(path: Path) -> bool:
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
