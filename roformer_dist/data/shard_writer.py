"""Writing one shard: a webdataset tar, its index, and the checksums of its blocks."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from roformer_dist.data.files import sha256_file
from roformer_dist.data.manifest import BLOCK_BYTES, BLOCKS_DTYPE, INDEX_DTYPE, Shard
from roformer_dist.data.tar import padding, tar_end, tar_header


def group_hash(key: str | None) -> int:
    """The ``group`` of an index record: the first 8 bytes of sha256 of ``key`` in UTF-8, as little-endian;
    0 for None."""
    return 0 if key is None else int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")


def meta_bytes(meta: dict[str, Any]) -> bytes:
    """The JSON member of a document."""
    return json.dumps(meta, sort_keys=True).encode()


class ShardWriter:
    """Writes the tar of shard ``number`` into ``folder``, and at its end the files beside it."""

    def __init__(self, folder: Path, number: int, itemsize: int) -> None:
        self._path = folder / f"shard-{number:06d}.tar"
        self._itemsize = itemsize
        self._file = open(self._path, "wb")  # noqa: SIM115
        self._offset = 0
        self._records: list[tuple[int, int, int, int, int]] = []
        self._blocks: list[int] = []
        self.token_bytes = 0

    @property
    def documents(self) -> int:
        """How many were added."""
        return len(self._records)

    def add(self, key: str, data: bytes, meta: dict[str, Any], group: int) -> None:
        """Write a document: its tokens as ``data``, and what is known about it."""
        self._write(f"{key}.json", meta_bytes(meta))
        self._write(f"{key}.tokens.bin", data)
        offset = self._offset - len(data) - len(padding(len(data)))
        self._records.append((offset, len(data), len(data) // self._itemsize, zlib.crc32(data), group))
        view = memoryview(data)
        self._blocks += [
            zlib.crc32(view[start : start + BLOCK_BYTES]) for start in range(0, len(data), BLOCK_BYTES)
        ]
        self.token_bytes += len(data)

    def close(self) -> Shard:
        """Finish all files of the shard; they are on disk when this returns."""
        self._file.write(tar_end(self._offset))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = np.array(self._records, dtype=INDEX_DTYPE)
        name = self._path.name
        stem = name.removesuffix(".tar")
        return Shard(
            name=name,
            bytes=self._path.stat().st_size,
            sha256=sha256_file(self._path),
            index_sha256=self._save(f"{stem}.idx.npy", index),
            blocks_sha256=self._save(f"{stem}.blocks.npy", np.array(self._blocks, dtype=BLOCKS_DTYPE)),
            documents=len(index),
            tokens=int(index["tokens"].sum()),
        )

    def abandon(self) -> None:
        """Close the tar unfinished: it has no index, and nothing notes it as finished."""
        # What cannot be written any more has been said before.
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, name: str, data: bytes) -> None:
        parts = tar_header(name, len(data)), data, padding(len(data))
        self._file.writelines(parts)
        self._offset += sum(map(len, parts))

    def _save(self, name: str, array: np.ndarray) -> str:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        with open(self._path.parent / name, "wb") as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        return hashlib.sha256(buffer.getvalue()).hexdigest()
