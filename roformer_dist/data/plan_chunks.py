"""A large plan's arrays, mapped from its file and checked in chunks of rows as they are read.

So opening a plan and reading a step cost the same whatever the number of rows.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from roformer_dist.data.errors import DataError

CHUNKS = "chunks"  # the table's name in the file
# Bytes of a plan's file; a smaller one is read and checked whole when it is opened.
MAPPED_BYTES = 16 * 2**20
_PIECES = ("document", "start", "length", "ends_document")
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: the lengths of its name and of its extra field


def chunk_rows(rows: int) -> int:
    """Rows of a chunk: the smallest power of two from 1,024 on with at most 16,384 chunks."""
    size = 1024
    while size * 16_384 < rows:
        size *= 2
    return size


def chunk_table(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The sha256 of each chunk of a plan's ``arrays``, uint8 ``[chunks, 32]``."""
    rows = len(arrays["row_offsets"]) - 1
    digests = [_digest(arrays, first, rows) for first in range(0, rows, chunk_rows(rows))]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)


def _digest(arrays: Mapping[str, np.ndarray], first: int, rows: int) -> bytes:
    """The sha256 of the offsets of the chunk's rows, and of their pieces in the order of ``_PIECES``."""
    offsets = arrays["row_offsets"][first : min(first + chunk_rows(rows), rows) + 1]
    digest = hashlib.sha256(offsets.tobytes())
    pieces = slice(int(offsets[0]), int(offsets[-1]))
    for name in _PIECES:
        digest.update(arrays[name][pieces].tobytes())
    return digest.digest()


class Chunks:
    """Checks the rows of a mapped plan, each chunk when it is first asked for.

    Args:
        path: of the plan, for messages.
        arrays: of the plan, by name.
        table: what ``chunk_table`` gave when it was written.

    Raises:
        DataError: the table is not of so many rows.
    """

    def __init__(self, path: str, arrays: Mapping[str, np.ndarray], table: np.ndarray) -> None:
        self._path, self._arrays, self._table = path, arrays, table
        self._rows = len(arrays["row_offsets"]) - 1
        self._size = chunk_rows(self._rows)
        if table.dtype != np.uint8 or table.shape != (-(-self._rows // self._size), 32):
            raise DataError(
                f"{path}: {CHUNKS} is {table.dtype} {table.shape} for {self._rows} rows; pack it again"
            )
        self._good = np.zeros(len(table), bool)

    def check(self, rows: int | np.ndarray) -> None:
        """Raise ``DataError`` unless ``rows`` are those that were written."""
        chunks = np.asarray(rows) // self._size
        if self._good[chunks].all():
            return
        for chunk in np.unique(chunks).tolist():
            if self._good[chunk]:
                continue
            first = chunk * self._size
            if _digest(self._arrays, first, self._rows) != self._table[chunk].tobytes():
                last = min(first + self._size, self._rows) - 1
                raise DataError(
                    f"{self._path}: rows {first} to {last} are damaged; restore it or pack it again"
                )
            self._good[chunk] = True


def map_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray] | None:
    """The arrays ``names`` of a ``.npz`` file, read-only and not yet read; None where one is compressed."""
    mapped: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for name in names:
            member = archive.getinfo(f"{name}.npy")
            if member.compress_type != zipfile.ZIP_STORED:
                return None
            file.seek(member.header_offset)
            file.seek(sum(_LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))), 1)
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            whole = np.empty(0, dtype) if 0 in shape else np.memmap(path, dtype, "r", file.tell(), shape)
            mapped[name] = np.asarray(whole)
    return mapped
