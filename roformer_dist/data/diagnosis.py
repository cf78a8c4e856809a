"""What inside a tar is not as it was written, by the key of its document.

All that a shard holds follows from the documents' keys, sizes and JSON members, so it is made again and compared.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from roformer_dist.data.manifest import BLOCK_BYTES
from roformer_dist.data.shard_writer import group_hash, meta_bytes
from roformer_dist.data.tar import BLOCK, padding, size_of, tar_end, tar_header

_LOST = "has a damaged tar header; as the index is damaged too, nothing from there on can be found"
_FIELDS = {"source", "line", "row", "group"}


def damaged_documents(
    tar: Path, first: int, documents: int, index: np.ndarray | None, blocks: np.ndarray | None
) -> Iterator[tuple[str, str]]:
    """``(key, what is wrong)`` of each damaged document of a shard, and once ``("", …)`` for its end.

    Args:
        first: the number of its first document; it holds ``documents`` of them.
        index: ``INDEX_DTYPE`` ``[documents]``, or None where it is damaged: then the headers lead from
            one document to the next, as long as they can be read.
        blocks: uint32 ``[blocks]``, the checksums that are used without an index, or None.
    """
    with open(tar, "rb") as file:
        start = block = 0
        for number in range(documents):
            key = f"{first + number:012d}"
            record = None if index is None else index[number]
            place = _place(file, start) if record is None else (int(record["offset"]), int(record["bytes"]))
            if place is None:
                yield key, _LOST
                return
            offset, size = place
            data = _read(file, offset, size + len(padding(size)))
            problems = []
            count = -(-size // BLOCK_BYTES)
            if record is not None:
                whole = zlib.crc32(data[:size]) == record["crc32"]
            else:
                whole = blocks is None or _checksums(data[:size]) == blocks[block : block + count].tolist()
            if not whole:
                problems.append("fails its crc32")
            head = _read(file, start, offset - start)
            header, room, header_of_tokens = head[:BLOCK], head[BLOCK:-BLOCK], head[-BLOCK:]
            text = room[: size_of(header)] if size_of(header) is not None else room.rstrip(b"\0")
            expected = tar_header(f"{key}.json", len(text)), tar_header(f"{key}.tokens.bin", size)
            if (header, header_of_tokens) != expected:
                if record is None:
                    yield key, _LOST
                    return
                problems.append("has a damaged tar header")
            if not _is_meta(text, record):
                problems.append("has a damaged JSON member")
            if room != text + padding(len(text)) or data[size:] != padding(size):
                problems.append("is followed by bytes that are not zero")
            if problems:
                yield key, ", ".join(problems)
            start, block = offset + len(data[:size]) + len(padding(size)), block + count
        if _read(file, start, tar.stat().st_size) != tar_end(start):
            yield "", "the end of the tar is damaged"


def _place(file: IO[bytes], start: int) -> tuple[int, int] | None:
    """Offset and size of the tokens of a document that begins at ``start``, as the headers say."""
    size = size_of(_read(file, start, BLOCK))
    if size is None:
        return None
    offset = start + BLOCK + size + len(padding(size)) + BLOCK
    size = size_of(_read(file, offset - BLOCK, BLOCK))
    return None if size is None else (offset, size)


def _read(file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    try:
        return file.read(size)
    except OSError:
        return b""  # a sector that the disk has lost: what is in it is damaged


def _checksums(data: bytes) -> list[int]:
    return [zlib.crc32(data[at : at + BLOCK_BYTES]) for at in range(0, len(data), BLOCK_BYTES)]


def _is_meta(text: bytes, record: np.void | None) -> bool:
    """Whether ``text`` could have been written as a JSON member; a changed letter of a name is not seen."""
    try:
        meta = json.loads(text)
        group = group_hash(meta.get("group"))
        return (
            meta_bytes(meta) == text and set(meta) <= _FIELDS and (record is None or group == record["group"])
        )
    except (ValueError, AttributeError, RecursionError):
        return False
