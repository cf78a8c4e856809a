"""Exact duplicates, found on disk: memory does not grow with the number of documents, and a kill loses nothing."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from roformer_dist.data.errors import DataError

_CACHE_KIB = 256 * 1024


class SeenDocuments:
    """The sha256 of every document kept so far, each with the number of its shard.

    Args:
        path: the database; created when absent.
        shards, documents: how many are finished. What was noted for later shards is forgotten, because
            those will be written again.

    Raises:
        DataError: the database does not hold exactly the finished shards' documents.
    """

    def __init__(self, path: Path, *, shards: int, documents: int) -> None:
        try:
            self._database = sqlite3.connect(path, isolation_level=None)
            self._database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS seen (sha256 BLOB PRIMARY KEY, shard INTEGER) WITHOUT ROWID"
            )
            self._database.execute("BEGIN")
            self._database.execute("DELETE FROM seen WHERE shard >= ?", (shards,))
            [(count,)] = self._database.execute("SELECT count(*) FROM seen")
        except sqlite3.DatabaseError as error:
            raise DataError(f"{path}: damaged ({error}); delete {path.parent} and start again") from None
        if count != documents:
            self.close()
            raise DataError(
                f"{path}: knows {count} documents where the finished shards have {documents}; "
                f"delete {path.parent} and start again"
            )

    def add(self, sha256: bytes, shard: int) -> bool:
        """Note a document; False when an equal one was noted before."""
        cursor = self._database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (sha256, shard))
        return cursor.rowcount == 1

    def commit(self) -> None:
        """Put on disk what was noted."""
        self._database.execute("COMMIT")
        self._database.execute("BEGIN")

    def close(self) -> None:
        """Forget what was noted since the last ``commit``."""
        self._database.close()
