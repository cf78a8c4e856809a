"""The plan: which pieces of documents fill each row, how they were chosen, and its file.

``roformer_dist.data.packing`` makes plans; ``docs/data_format.md`` describes the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from roformer_dist.data.errors import DataError
from roformer_dist.data.files import (
    atomic_file,
    atomic_folder,
    json_bytes,
    parse_json,
    sha256_json,
    writing,
)
from roformer_dist.data.plan_chunks import CHUNKS, MAPPED_BYTES, Chunks, chunk_table, map_arrays
from roformer_dist.data.remote import RefusedError, is_url, join, local_copy, read_bytes, without_secrets
from roformer_dist.data.store import ShardStore

FORMAT, VERSION = "roformer_dist.plan", 2
BUCKETS_FORMAT, BUCKETS = "roformer_dist.buckets", "buckets.json"
_INT64 = ("row_offsets", "document", "start", "length", "group_offsets")
_ARRAYS = ("row_offsets", "document", "start", "length", "ends_document", "group_offsets")


@dataclass(frozen=True)
class PackOptions:
    """How documents are packed; every field is part of the plan's hash.

    Attributes:
        method: ``best-fit``, ``concat`` or ``bucket``.
        seed: of the shard groups, of which documents share a row, and of the rows' order.
        document_mask: whether attention and positions stop at the documents of a row.
        shards_per_group: shards packed together; a row holds documents of one shard group only.
        window: shard groups whose rows are mixed with each other at any time of a training.
        group_by_key: lay the documents of one group key next to each other, in input order.
        upsample: ``(min_tokens, factor)`` pairs; what has at least ``min_tokens`` is laid out ``factor``
            times, by the largest ``min_tokens`` that applies.
        max_padding: best-fit only, the fraction of padding above which documents are cut to fill rows.
        min_len, max_len: bucket only, the shortest and the longest row.
    """

    method: str = "best-fit"
    seed: int = 0
    document_mask: bool = True
    shards_per_group: int = 8
    window: int = 4
    group_by_key: bool = False
    upsample: tuple[tuple[int, float], ...] = ()
    max_padding: float | None = None
    min_len: int | None = None
    max_len: int | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PackOptions:
        """The inverse of ``asdict`` after a pass through JSON."""
        pairs = tuple((int(tokens), float(factor)) for tokens, factor in values["upsample"])
        return cls(**{**values, "upsample": pairs})


@dataclass(frozen=True)
class Plan:
    """Rows of ``seq_len`` tokens as pieces of documents.

    Row ``r`` is the pieces ``row_offsets[r]:row_offsets[r + 1]``, in order; what is left of
    ``seq_len`` after them is padding.

    Attributes:
        seq_len: tokens of a row.
        manifest_root: the shards it belongs to.
        options: how it was packed.
        row_offsets: int64 ``[rows + 1]``.
        document, start, length: int64 ``[pieces]``; token ``start`` and the next ``length - 1``.
        ends_document: bool ``[pieces]``, whether the piece holds its document's last token.
        group_offsets: int64 ``[groups + 1]``; the rows of shard group ``g`` are
            ``group_offsets[g]:group_offsets[g + 1]`` and hold documents of its shards only.
    """

    seq_len: int
    manifest_root: str
    options: PackOptions
    row_offsets: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    ends_document: np.ndarray
    group_offsets: np.ndarray

    @property
    def method(self) -> str:
        """``best-fit``, ``concat`` or ``bucket``."""
        return self.options.method

    @property
    def document_mask(self) -> bool:
        """Whether attention and positions stop at the documents of a row."""
        return self.options.document_mask

    @property
    def window(self) -> int:
        """Shard groups whose rows are mixed with each other at any time."""
        return self.options.window

    @property
    def num_rows(self) -> int:
        """Rows in one epoch."""
        return len(self.row_offsets) - 1

    @property
    def num_groups(self) -> int:
        """Shard groups; some may hold no row of this length."""
        return len(self.group_offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Real tokens of all rows, padding not counted."""
        return int(self.length.sum())

    @property
    def padding(self) -> float:
        """The fraction of all slots that is padding, 0 to 1."""
        return 1.0 - self.num_tokens / (self.num_rows * self.seq_len)

    def pieces(self, row: int) -> slice:
        """Where the pieces of ``row`` are in the piece arrays; raises as ``check_rows``."""
        self.check_rows(row)
        return slice(int(self.row_offsets[row]), int(self.row_offsets[row + 1]))

    def check_rows(self, rows: int | np.ndarray) -> None:
        """Raise ``DataError`` where ``rows`` of a plan that is mapped are not those that were written."""
        if self._chunks is not None:
            self._chunks.check(rows)

    @cached_property
    def _chunks(self) -> Chunks | None:
        """What checks rows as they are read; a plan in memory needs nothing, ``load`` gives it to a mapped one."""
        return None

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
        return sha256_json(self._meta)

    @cached_property
    def _meta(self) -> dict[str, Any]:
        content = hashlib.sha256()
        for name in _ARRAYS:
            content.update(np.ascontiguousarray(getattr(self, name)).data)
        return {
            "format": FORMAT,
            "version": VERSION,
            "seq_len": self.seq_len,
            "manifest_root": self.manifest_root,
            "options": asdict(self.options),
            "content_sha256": content.hexdigest(),
        }

    def save(self, path: str | Path) -> None:
        """Write the plan, all at once or not at all."""
        meta = json.dumps({**self._meta, "hash": self.hash}, sort_keys=True).encode()
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        extra = {"meta": np.frombuffer(meta, np.uint8), CHUNKS: chunk_table(arrays)}
        with writing(path), atomic_file(Path(path)) as file:
            np.savez(file, allow_pickle=False, **extra, **arrays)

    @classmethod
    def load(cls, path: str | Path, *, whole: bool = False) -> Plan:
        """Open a plan, local or behind a URL. A large one is checked row by row as it is read, unless ``whole``.

        Raises:
            DataError: no such file, not a plan, another version, damaged, or a URL that cannot be read.
        """
        if is_url(path):
            shown = without_secrets(str(path))
        elif Path(path).is_file():
            shown = str(path)
        else:
            raise DataError(f"{path}: no such plan; make it with: roformer-dist data pack")
        with local_copy(path) as file:
            try:
                return cls._open(file, shown, whole or file.stat().st_size < MAPPED_BYTES)
            except DataError:
                raise
            except Exception as error:
                # Whatever zipfile, numpy or a missing field makes of damaged bytes; no list of it is complete.
                detail = " ".join(str(error).split()) or type(error).__name__
                raise DataError(f"{shown}: not a plan, or damaged ({detail}); pack it again") from None

    @classmethod
    def _open(cls, file: Path, path: str, whole: bool) -> Plan:
        with np.load(file, allow_pickle=False) as stored:
            meta = json.loads(stored["meta"].tobytes())
            found = (meta.get("format"), meta.get("version"))
            if found != (FORMAT, VERSION):
                raise DataError(
                    f"{path}: format {found[0]!r} version {found[1]!r}, this program reads "
                    f"{FORMAT!r} version {VERSION}; pack it again"
                )
            arrays = None if whole or CHUNKS not in stored else map_arrays(file, _ARRAYS)
            if arrays is None:
                arrays, chunks = {name: stored[name] for name in _ARRAYS}, None
            else:
                arrays["group_offsets"] = stored["group_offsets"]  # small, and checked by the archive's crc32
                chunks = Chunks(path, arrays, stored[CHUNKS])
        for name, array in arrays.items():
            expected = np.dtype("<i8") if name in _INT64 else np.dtype(bool)
            if array.dtype != expected or array.ndim != 1:
                raise DataError(f"{path}: {name} is {array.dtype} {array.shape}; pack it again")
        plan = cls(meta["seq_len"], meta["manifest_root"], PackOptions.from_dict(meta["options"]), **arrays)
        recorded = meta.pop("hash")
        if chunks is not None:
            # As if they had been computed: content_sha256 takes the whole file to know.
            vars(plan).update(_chunks=chunks, _meta=meta)
        if plan.hash != recorded:
            raise DataError(f"{path}: hash {plan.hash[:16]}…, recorded {str(recorded)[:16]}…; pack it again")
        return plan

    def check_store(self, store: ShardStore) -> None:
        """Raise ``DataError`` with both hashes unless the plan was made for this store."""
        if self.manifest_root != store.root:
            raise DataError(
                f"{store.path}: manifest root {store.root}, but the plan was made for "
                f"{self.manifest_root}; pack these shards again"
            )


def bucket_name(seq_len: int) -> str:
    """The file of the rows of ``seq_len`` tokens in a folder of buckets."""
    return f"len_{seq_len:06d}.npz"


def save_buckets(plans: Sequence[Plan], path: str | Path) -> None:
    """Write plans of several row lengths as the folder ``path``, which must be absent or empty."""
    with writing(path), atomic_folder(Path(path)) as folder:
        for plan in plans:
            plan.save(folder / bucket_name(plan.seq_len))
        hashes = {bucket_name(plan.seq_len): plan.hash for plan in plans}
        record = {"format": BUCKETS_FORMAT, "version": VERSION, "plans": hashes}
        (folder / BUCKETS).write_bytes(json_bytes({**record, "hash": sha256_json(record)}))


def is_buckets(path: str | Path) -> bool:
    """Whether a folder or its URL is one of buckets; ``DataError`` when the URL gives no answer."""
    if not is_url(path):
        return (Path(path) / BUCKETS).is_file()
    try:
        read_bytes(join(str(path), BUCKETS))
    except RefusedError:
        return False
    return True


def load_plans(path: str | Path, *, whole: bool = False) -> list[Plan]:
    """The plan in a file, or the plans of a folder of buckets, shortest rows first; hashes checked.

    Args:
        path: local, or a URL: one that ends in ``.npz`` is a file, any other a folder.
        whole: as in ``Plan.load``.

    Raises:
        DataError: nothing there, not a plan, another version, damaged, or a bucket that is not the
            one the folder was written with.
    """
    if is_plan_file(path) or (not is_url(path) and not Path(path).is_dir()):
        return [Plan.load(path, whole=whole)]
    if not is_url(path) and not is_buckets(path):
        raise DataError(
            f"{path}: no {BUCKETS}, so not a folder of plans; make it with: roformer-dist data pack"
        )
    index = join(str(path), BUCKETS)
    shown = without_secrets(index) if is_url(path) else index
    record = parse_json(read_bytes(index), shown)
    if (record.get("format"), record.get("version")) != (BUCKETS_FORMAT, VERSION):
        raise DataError(
            f"{shown}: format {record.get('format')!r} version {record.get('version')!r}, this "
            f"program reads {BUCKETS_FORMAT!r} version {VERSION}; pack it again"
        )
    if record.pop("hash", None) != sha256_json(record):
        raise DataError(f"{shown}: its content does not match its hash; pack it again")
    plans = []
    for name, expected in sorted(record["plans"].items()):
        plan = Plan.load(join(str(path), name), whole=whole)
        if plan.hash != expected:
            raise DataError(
                f"{shown.removesuffix(BUCKETS)}{name}: hash {plan.hash[:16]}…, {BUCKETS} says {expected[:16]}…; "
                "pack it again"
            )
        plans.append(plan)
    return sorted(plans, key=lambda plan: plan.seq_len)


def is_plan_file(path: str | Path) -> bool:
    """Whether ``path`` names one plan: a local file, or a URL that ends in ``.npz`` (a query left aside)."""
    return urlsplit(str(path)).path.endswith(".npz") if is_url(path) else Path(path).is_file()
