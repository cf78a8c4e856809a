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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roformer_dist.data.cache_files import CachedFile, charge, evict
from roformer_dist.data.errors import DataError
from roformer_dist.data.remote import RetryPolicy, download, sha256_bytes, without_secrets

GIB = 2**30
_POLL_SECONDS = 0.05
_FAILURE_SECONDS = 600.0


def default_folder() -> Path:
    """Where the cache is unless chosen: ``$XDG_CACHE_HOME/roformer_dist``, usually below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "roformer_dist"


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
                evict(path)
            for path in self.folder.glob("locks/*.failed"):
                # Who waited for that download has long been told.
                if time.time() - path.stat().st_mtime > _FAILURE_SECONDS:
                    path.unlink()

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
        if file := self._find(sha256, size):
            return file
        with self._mutex(sha256[:2]):
            if file := self._find(sha256, size):
                return file
            with self._one_failure(asked, sha256):
                return self._fetch(url, sha256, size)

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
            with self._one_failure(asked, sha256):
                return self._fetch_small(url, sha256)

    def drop(self, file: CachedFile) -> None:
        """Forget a file that turned out to be damaged; who reads it goes on reading what it has."""
        with self._mutex("folder"):
            if file.same_as(file.path):  # else another process was first
                file.path.unlink()

    def used_bytes(self) -> int:
        """What the files take, with the full size of those that are being downloaded."""
        return sum(charge(path, stat) for path, stat in self._files())

    def _find(self, sha256: str, size: int) -> CachedFile | None:
        for name in (sha256, f"{sha256}.damaged"):
            try:
                file = CachedFile(self.folder / name)
            except FileNotFoundError:
                continue
            if not file.acquire():
                continue
            if file.size == size or file.damaged_origin:
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

    def _fetch(self, url: str, sha256: str, size: int) -> CachedFile:
        partial, lock = self._reserve(sha256, size)
        try:
            intact = download(url, partial, sha256=sha256, size=size, policy=self.policy)
            self.downloads += 1
            return self._publish(partial, sha256 if intact else f"{sha256}.damaged", lock)
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
            self._publish(partial, sha256, lock).release()
        finally:
            partial.unlink(missing_ok=True)
            os.close(lock)
        return data

    def _publish(self, partial: Path, name: str, lock: int) -> CachedFile:
        """Give a complete file its name; acquired, before anybody can evict it."""
        with self._mutex("folder"):
            os.replace(partial, self.folder / name)
            file = CachedFile(self.folder / name)
            fcntl.flock(lock, fcntl.LOCK_SH)
            acquired = file.acquire()
            assert acquired
        return file

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
        held = sum(charge(path, stat) for path, stat in files)
        for path, stat in files:
            # What a killed process left of a download is of no use, whether there is room or not.
            if (held + size > self.max_bytes or path.suffix == ".partial") and evict(path):
                held -= charge(path, stat)
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

    @contextmanager
    def _one_failure(self, asked: float, sha256: str) -> Iterator[None]:
        """Who waited for a download that failed fails with it: in turn, the waits would add up."""
        failure = self.folder / "locks" / f"{sha256}.failed"
        try:
            if failure.stat().st_mtime >= asked:
                raise DataError(failure.read_text())
        except FileNotFoundError:
            pass
        try:
            yield
        except DataError as error:
            failure.write_text(str(error))
            raise
        failure.unlink(missing_ok=True)
