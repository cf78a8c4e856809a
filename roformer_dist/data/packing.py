"""Packing documents into rows of a fixed length, and the plan file that records it.

A plan names, for each row, the pieces of documents that fill it. Long documents are split over rows,
never truncated, so every token of the store is in exactly one piece. Only lengths are read.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from roformer_dist.data.errors import DataError
from roformer_dist.data.files import atomic_file, sha256_json
from roformer_dist.data.hashing import hash64
from roformer_dist.data.store import ShardStore

METHODS = ("best-fit", "concat")
FORMAT, VERSION = "roformer_dist.plan", 1
_ARRAYS = ("row_offsets", "document", "start", "length", "ends_document")
_Pieces = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # row, document, start, length


@dataclass(frozen=True)
class Plan:
    """Rows of ``seq_len`` tokens as pieces of documents.

    Row ``r`` is the pieces ``row_offsets[r]:row_offsets[r + 1]``, in order; what is left of
    ``seq_len`` after them is padding.

    Attributes:
        seq_len: tokens of a row.
        method, seed: how it was packed.
        manifest_root: the shards it belongs to.
        row_offsets: int64 ``[rows + 1]``.
        document, start, length: int64 ``[pieces]``; token ``start`` and the next ``length - 1``.
        ends_document: bool ``[pieces]``, whether the piece holds its document's last token.
    """

    seq_len: int
    method: str
    seed: int
    manifest_root: str
    row_offsets: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    ends_document: np.ndarray

    @property
    def num_rows(self) -> int:
        """Rows in one epoch."""
        return len(self.row_offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Real tokens of all rows, padding not counted."""
        return int(self.length.sum())

    @property
    def padding(self) -> float:
        """The fraction of all slots that is padding, 0 to 1."""
        return 1.0 - self.num_tokens / (self.num_rows * self.seq_len)

    @cached_property
    def targets_per_row(self) -> np.ndarray:
        """int64 ``[rows]``: tokens that have a next token in their document."""
        total = np.concatenate([[0], np.cumsum(self.length - self.ends_document)])
        return total[self.row_offsets[1:]] - total[self.row_offsets[:-1]]

    def pieces(self, row: int) -> slice:
        """Where the pieces of ``row`` are in the piece arrays."""
        return slice(int(self.row_offsets[row]), int(self.row_offsets[row + 1]))

    def has_target(self, row: int) -> np.ndarray:
        """bool ``[seq_len]``: real tokens of ``row`` that are not the last of their document."""
        pieces = self.pieces(row)
        ends = np.cumsum(self.length[pieces])
        result = np.arange(self.seq_len) < ends[-1]
        result[ends[self.ends_document[pieces]] - 1] = False
        return result

    @cached_property
    def hash(self) -> str:
        """sha256 of what the plan is made of and of its content."""
        return sha256_json(self._meta())

    def _meta(self) -> dict[str, Any]:
        content = hashlib.sha256()
        for name in _ARRAYS:
            content.update(getattr(self, name).tobytes())
        return {
            "format": FORMAT,
            "version": VERSION,
            "seq_len": self.seq_len,
            "method": self.method,
            "seed": self.seed,
            "manifest_root": self.manifest_root,
            "content_sha256": content.hexdigest(),
        }

    def save(self, path: str | Path) -> None:
        """Write the plan, all at once or not at all."""
        meta = json.dumps({**self._meta(), "hash": self.hash}, sort_keys=True).encode()
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        with atomic_file(Path(path)) as file:
            np.savez_compressed(file, allow_pickle=False, meta=np.frombuffer(meta, np.uint8), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan and check its hash and its structure.

        Raises:
            DataError: no such file, not a plan, another version, or damaged.
        """
        if not Path(path).is_file():
            raise DataError(f"{path}: no such plan; make it with: roformer-dist data pack")
        try:
            with np.load(path, allow_pickle=False) as file:
                meta = json.loads(file["meta"].tobytes())
                arrays = {name: file[name] for name in _ARRAYS}
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            detail = " ".join(str(error).split())
            raise DataError(f"{path}: not a plan, or damaged ({detail}); pack it again") from None
        if (meta.get("format"), meta.get("version")) != (FORMAT, VERSION):
            raise DataError(
                f"{path}: format {meta.get('format')!r} version {meta.get('version')!r}, this program reads "
                f"{FORMAT!r} version {VERSION}; pack it again"
            )
        plan = cls(meta["seq_len"], meta["method"], meta["seed"], meta["manifest_root"], **arrays)
        if plan.hash != meta["hash"]:
            raise DataError(
                f"{path}: hash {plan.hash[:16]}…, recorded {str(meta['hash'])[:16]}…; pack it again"
            )
        return plan

    def check_store(self, store: ShardStore) -> None:
        """Raise ``DataError`` with both hashes unless the plan was made for this store."""
        if self.manifest_root != store.root:
            raise DataError(
                f"{store.path}: manifest root {store.root}, but the plan was made for "
                f"{self.manifest_root}; pack these shards again"
            )


def make_plan(store: ShardStore, seq_len: int, *, method: str = "best-fit", seed: int = 0) -> Plan:
    """Pack all documents of ``store`` into rows of ``seq_len`` tokens.

    ``best-fit`` gives every full ``seq_len`` of a long document its own row and puts each remainder,
    longest first, into the row with the least room that holds it (best-fit decreasing).
    ``concat`` joins the documents and cuts every ``seq_len`` tokens. ``seed`` shuffles the documents
    before packing and the rows after it, so that the first rows are a fair sample.

    Raises:
        DataError: the store is empty, or an argument is out of range.
    """
    if seq_len < 2:
        raise DataError(f"--seq-len {seq_len} leaves no token to predict; give at least 2")
    if method not in METHODS:
        raise DataError(f"--method {method}: unknown; use {' or '.join(METHODS)}")
    if len(store) == 0:
        raise DataError(f"{store.path}: holds no documents, so there is nothing to pack")
    lengths = store.lengths
    shuffled = np.argsort(hash64(seed, 0, np.arange(len(lengths))), kind="stable")
    pack = _best_fit if method == "best-fit" else _concat
    row, document, start, length = pack(lengths, shuffled, seq_len)
    rows = int(row.max()) + 1
    row = np.argsort(np.argsort(hash64(seed, 1, np.arange(rows)), kind="stable"), kind="stable")[row]
    order = np.argsort(row, kind="stable")
    row, document, start, length = (array[order] for array in (row, document, start, length))
    return Plan(
        seq_len=seq_len,
        method=method,
        seed=seed,
        manifest_root=store.root,
        row_offsets=np.searchsorted(row, np.arange(rows + 1)).astype(np.int64),
        document=document,
        start=start,
        length=length,
        ends_document=start + length == lengths[document],
    )


def _concat(lengths: np.ndarray, shuffled: np.ndarray, seq_len: int) -> _Pieces:
    """Cut the joined documents at every document's start and at every multiple of ``seq_len``."""
    firsts = np.concatenate([[0], np.cumsum(lengths[shuffled])])
    begins = np.union1d(firsts[:-1], np.arange(0, firsts[-1], seq_len))
    position = np.searchsorted(firsts, begins, side="right") - 1
    length = np.diff(np.append(begins, firsts[-1]))
    return begins // seq_len, shuffled[position], begins - firsts[position], length


def _best_fit(lengths: np.ndarray, shuffled: np.ndarray, seq_len: int) -> _Pieces:
    full, rest = np.divmod(lengths[shuffled], seq_len)
    document = np.repeat(shuffled, full)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(full) - full, full)) * seq_len
    short = np.flatnonzero(rest)
    short = short[np.argsort(-rest[short], kind="stable")]
    row = len(document) + _place(rest[short].tolist(), seq_len)
    return (
        np.concatenate([np.arange(len(document)), row]),
        np.concatenate([document, shuffled[short]]),
        np.concatenate([start, full[short] * seq_len]),
        np.concatenate([np.full(len(document), seq_len), rest[short]]),
    )


def _place(sizes: list[int], seq_len: int) -> np.ndarray:
    """The row of each size (given longest first): the fullest row with room, else a new one."""
    rows = np.empty(len(sizes), dtype=np.int64)
    by_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # the keys of by_room that hold a row, sorted
    count = 0
    for item, size in enumerate(sizes):
        found = bisect_left(rooms, size)
        if found < len(rooms):
            room = rooms[found]
            row = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(found)
        else:
            room, row = seq_len, count
            count += 1
        rows[item] = row
        left = room - size
        if left:
            if not by_room[left]:
                insort(rooms, left)
            by_room[left].append(row)
    return rows


def verify_plan(plan: Plan, store: ShardStore) -> str | None:
    """What is wrong with ``plan`` for ``store``, or None: same shards, every token exactly once."""
    if plan.manifest_root != store.root:
        return f"made for manifest root {plan.manifest_root[:16]}…, these shards have {store.root[:16]}…"
    order = np.lexsort((plan.start, plan.document))
    document, start, length = plan.document[order], plan.start[order], plan.length[order]
    expected = np.where(np.diff(document, prepend=-1) != 0, 0, np.roll(start + length, 1))
    per_document = np.bincount(document, weights=length, minlength=len(store)).astype(np.int64)
    if (start != expected).any() or (length < 1).any():
        return f"document {document[(start != expected) | (length < 1)][0]} has tokens twice or not at all"
    if len(per_document) != len(store) or (per_document != store.lengths).any():
        return f"its pieces hold {plan.num_tokens} tokens, the shards hold {store.num_tokens}"
    return None
