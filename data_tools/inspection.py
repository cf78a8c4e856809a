"""What ``inspect`` and ``verify`` look at, as plain values for the commands to print."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from roformer_dist.data.errors import DataError
from roformer_dist.data.plan import Plan
from roformer_dist.data.plan_check import verify_plan
from roformer_dist.data.store import ShardStore
from roformer_dist.data.tokenizer import Tokenizer
from roformer_dist.data.verify import verify_shards

Pieces = list[tuple[str, str]]


def describe_document(path: Path, document: int) -> tuple[dict[str, Any], Pieces]:
    """Facts about one document of a shards folder, and its text as one piece."""
    with ShardStore(path) as store:
        if not 0 <= document < len(store):
            raise DataError(f"--document {document}: {path} holds the documents 0 to {len(store) - 1}")
        tokens = store.read(document)
        text = Tokenizer(store.tokenizer_path).decode(tokens)
        summary = {
            "documents": len(store),
            "tokens": store.num_tokens,
            "document": document,
            "key": store.key(document),
            "document_tokens": len(tokens),
            "first_ids": " ".join(map(str, tokens[:12].tolist())),
        }
    return summary, [(f"document {document}, {len(tokens):,} tokens", text)]


def describe_row(path: Path, row: int, shards: Path | None) -> tuple[dict[str, Any], Pieces]:
    """Facts about one row of a plan and its pieces, with their text when ``shards`` is given."""
    plan = Plan.load(path)
    if not 0 <= row < plan.num_rows:
        raise DataError(f"--row {row}: {path} holds the rows 0 to {plan.num_rows - 1}")
    texts = _PieceTexts(plan, shards) if shards is not None else None
    found, pieces = plan.pieces(row), []
    used = 0
    for document, start, length, ends in zip(
        *(array[found].tolist() for array in (plan.document, plan.start, plan.length, plan.ends_document))
    ):
        heading = f"{used:,} to {used + length - 1:,}: document {document} from token {start:,}" + (
            ", to its end" if ends else ", continues in another row"
        )
        pieces.append((heading, texts.read(document, start, length) if texts else ""))
        used += length
    if used < plan.seq_len:
        pieces.append((f"{used:,} to {plan.seq_len - 1:,}: padding", ""))
    summary = {
        "rows": plan.num_rows,
        "seq_len": plan.seq_len,
        "row": row,
        "pieces": found.stop - found.start,
        "row_tokens": used,
        "targets": int(plan.targets_per_row[row]),
        "hash": plan.hash,
    }
    return summary, pieces


class _PieceTexts:
    """Decodes pieces of documents."""

    def __init__(self, plan: Plan, shards: Path) -> None:
        self._store = ShardStore(shards)
        plan.check_store(self._store)
        self._tokenizer = Tokenizer(self._store.tokenizer_path)

    def read(self, document: int, start: int, length: int) -> str:
        return self._tokenizer.decode(self._store.read(document)[start : start + length])


def checks(path: Path, shards: Path | None) -> Iterator[tuple[str, str | None]]:
    """Every check of a shards folder or a plan: ``(what was checked, what is wrong or None)``."""
    if path.is_dir():
        yield from verify_shards(path)
        return
    if not path.exists():
        raise DataError(f"{path}: no such shards folder or plan")
    try:
        plan = Plan.load(path)
    except DataError as error:
        yield path.name, str(error)
        return
    yield path.name, None
    if shards is not None:
        with ShardStore(shards) as store:
            problem = verify_plan(plan, store)
        yield f"{path.name} against {shards}", f"{path}: {problem}" if problem else None
