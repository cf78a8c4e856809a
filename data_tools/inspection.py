"""What ``inspect`` and ``verify`` look at, as plain values for the commands to print."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.packing_report import bucket_counts, octaves, row_fill
from roformer_dist.data.errors import DataError
from roformer_dist.data.json_tokenizer import open_tokenizer
from roformer_dist.data.plan import Plan, is_buckets, is_plan_file, load_plans
from roformer_dist.data.plan_check import verify_plan
from roformer_dist.data.remote import is_url
from roformer_dist.data.store import ShardStore
from roformer_dist.data.verify import verify_shards

Pieces = list[tuple[str, str]]


def is_plan(path: str) -> bool:
    """Whether ``path`` is a plan file or a folder of buckets, rather than a shards folder."""
    return is_plan_file(path) or is_buckets(path)


def check_choice(
    path: str, *, document: int | None, row: int | None, shards: str | None, seq_len: int | None
) -> None:
    """Raise ``DataError`` for an option that says nothing about what is at ``path``."""
    if is_plan(path):
        if document is not None:
            raise DataError(f"--document {document}: {path} is a plan; give --row, or the shards folder")
        if row is None and (shards is not None or seq_len is not None):
            raise DataError("--shards and --seq-len are for a row: give --row too, or leave them out")
        return
    for name, value in (("--row", row), ("--shards", shards), ("--seq-len", seq_len)):
        if value is not None:
            raise DataError(
                f"{name} {value}: is for a plan, and {path} is none; give the file of 'data pack'"
            )


def describe_document(path: str, document: int | None) -> tuple[dict[str, Any], Pieces]:
    """Facts about a shards folder and its lengths; with ``document``, that one's facts and its text."""
    with ShardStore(path) as store:
        summary: dict[str, Any] = {
            "documents": len(store),
            "tokens": store.num_tokens,
            "shards": len(store.manifest.shards),
            "root": store.root,
        }
        if document is None:
            lengths = store.lengths
            quartiles = np.percentile(lengths, (25, 50, 75)).astype(int).tolist() if len(store) else []
            return {**summary, "quartiles": quartiles, "document_lengths": octaves(lengths)}, []
        if not 0 <= document < len(store):
            raise DataError(f"--document {document}: {path} holds the documents 0 to {len(store) - 1}")
        tokens = store.read(document)
        text = open_tokenizer(store.tokenizer_path).decode(tokens)
        summary |= {
            "document": document,
            "key": store.key(document),
            "document_tokens": len(tokens),
            "first_ids": " ".join(map(str, tokens[:12].tolist())),
            "text": text,
        }
    return summary, [(f"document {document}, {len(tokens):,} tokens", text)]


def describe_plan(path: str) -> dict[str, Any]:
    """Facts about a plan or a folder of buckets: documents, pieces and how full the rows are."""
    plans = load_plans(path, whole=True)
    pieces = np.concatenate([plan.length for plan in plans])
    document = np.concatenate([plan.document for plan in plans])
    tokens = sum(plan.num_tokens for plan in plans)
    # A document's length is where its last piece ends.
    ends = [(plan.document, plan.start + plan.length, plan.ends_document) for plan in plans]
    lengths = np.zeros(int(document.max()) + 1, np.int64)
    for numbers, end, last in ends:
        lengths[numbers[last]] = end[last]
    return {
        "method": plans[0].method,
        "rows": sum(plan.num_rows for plan in plans),
        "tokens": tokens,
        "document_mask": plans[0].document_mask,
        "shard_groups": plans[0].num_groups,
        "window": plans[0].window,
        "hashes": {str(plan.seq_len): plan.hash for plan in plans},
        "buckets": [bucket_counts(plan, tokens) for plan in plans],
        "document_lengths": octaves(lengths[lengths > 0]),
        "piece_lengths": octaves(pieces),
        "row_fill": row_fill(plans),
    }


def describe_row(
    path: str, row: int, shards: str | None, seq_len: int | None
) -> tuple[dict[str, Any], Pieces]:
    """Facts about one row of a plan and its pieces, with their text when ``shards`` is given."""
    plan = _one_plan(path, seq_len)
    if not 0 <= row < plan.num_rows:
        raise DataError(f"--row {row}: {path} holds the rows 0 to {plan.num_rows - 1}")
    texts = _PieceTexts(plan, shards) if shards is not None else None
    found, pieces, listed = plan.pieces(row), [], []
    used = 0
    for document, start, length, ends in zip(
        *(array[found].tolist() for array in (plan.document, plan.start, plan.length, plan.ends_document))
    ):
        heading = f"{used:,} to {used + length - 1:,}: document {document} from token {start:,}" + (
            ", to its end" if ends else ", continues in another row"
        )
        text = texts.read(document, start, length) if texts else ""
        pieces.append((heading, text))
        listed.append({"document": document, "start": start, "length": length, "ends_document": ends})
        if texts:
            listed[-1]["text"] = text
        used += length
    if used < plan.seq_len:
        pieces.append((f"{used:,} to {plan.seq_len - 1:,}: padding", ""))
    summary = {
        "rows": plan.num_rows,
        "seq_len": plan.seq_len,
        "row": row,
        "shard_group": int(np.searchsorted(plan.group_offsets, row, side="right")) - 1,
        "document_mask": plan.document_mask,
        "pieces": listed,
        "row_tokens": used,
        "targets": int(plan.has_target(row).sum()),
        "hash": plan.hash,
    }
    return summary, pieces


def _one_plan(path: str, seq_len: int | None) -> Plan:
    plans = load_plans(path)
    lengths = [plan.seq_len for plan in plans]
    if seq_len is None and len(plans) > 1:
        raise DataError(f"{path}: holds rows of {lengths} tokens; choose one with --seq-len")
    if seq_len is not None and seq_len not in lengths:
        raise DataError(f"--seq-len {seq_len}: {path} holds rows of {lengths} tokens")
    return plans[0 if seq_len is None else lengths.index(seq_len)]


class _PieceTexts:
    """Decodes pieces of documents."""

    def __init__(self, plan: Plan, shards: str) -> None:
        self._store = ShardStore(shards)
        plan.check_store(self._store)
        self._tokenizer = open_tokenizer(self._store.tokenizer_path)

    def read(self, document: int, start: int, length: int) -> str:
        return self._tokenizer.decode(self._store.read(document, start, length))


def checks(path: str, shards: str | None) -> Iterator[tuple[str, str | None]]:
    """Every check of a shards folder or of plans: ``(what was checked, what is wrong or None)``."""
    if not is_plan(path):
        if not is_url(path) and not Path(path).exists():
            raise DataError(f"{path}: no such shards folder or plan")
        if shards is not None:
            raise DataError(f"--shards {shards}: is for a plan, and {path} is none; leave it out")
        yield from verify_shards(path)
        return
    try:
        plans = load_plans(path, whole=True)
    except DataError as error:
        yield Path(path).name, str(error)
        return
    for plan in plans:
        yield f"{Path(path).name}: rows of {plan.seq_len}", None
    if shards is not None:
        with ShardStore(shards) as store:
            problem = verify_plan(plans, store)
        yield f"{Path(path).name} against {shards}", f"{path}: {problem}" if problem else None
