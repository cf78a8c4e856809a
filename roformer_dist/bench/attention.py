"""``bench attention``: what each scheme sends, holds and computes for one layer. Counted, the same anywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from roformer_dist.bench.attention_count import Case, Counted, count
from roformer_dist.data.store import ShardStore
from roformer_dist.parallel.cost import Sent, mesh_sent, ring_tokens
from roformer_dist.parallel.heads import spread_heads
from roformer_dist.parallel.zigzag import deal

# Columns of the table of schemes: a narrower terminal breaks lines rather than figures.
TABLE_WIDTH = 104


@dataclass(frozen=True)
class AttentionSettings:
    """What the user chose.

    Attributes:
        documents: ``(median, sigma)`` of a lognormal law, or None for whole rows.
        lengths_from: a shards folder, or its URL, whose documents' lengths balance is computed for too.
    """

    ranks: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    documents: tuple[int, float] | None
    window: int | None
    balance_ranks: tuple[int, ...]
    balance_tokens: int
    lengths_from: str | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"--heads {self.heads} is not divisible by --kv-heads {self.kv_heads}")

    def case(
        self, ulysses_size: int, ring_size: int, head_chunks: int, *, causal: bool, form: str = "plain"
    ) -> Case:
        """The scheme on this row."""
        lengths = tuple(document_lengths(self.ranks * self.tokens, self.documents, seed=0).tolist())
        heads = (self.heads, self.kv_heads, self.head_dim)
        return Case(ulysses_size, ring_size, head_chunks, *heads, lengths, causal, self.window, form=form)


def document_lengths(total: int, documents: tuple[int, float] | np.ndarray | None, seed: int) -> np.ndarray:
    """Lengths that fill a row of ``total`` tokens; the last document is cut.

    Args:
        documents: ``(median, sigma)`` of a lognormal law; or lengths, which are drawn from with replacement;
            None is one document.
    """
    if documents is None:
        return np.array([total])
    generator, lengths = np.random.default_rng(seed), []
    while total > 0:
        if isinstance(documents, np.ndarray):
            drawn = int(generator.choice(documents))
        else:
            median, sigma = documents
            drawn = max(1, int(median * np.exp(sigma * generator.standard_normal())))
        lengths.append(min(total, drawn))
        total -= lengths[-1]
    return np.array(lengths)


def schemes(settings: AttentionSettings) -> list[tuple[int, int, int]]:
    """Every ``(ulysses_size, ring_size, head_chunks)`` of the ranks that the heads allow; chunks 1, 2 and 4."""
    ranks, found = settings.ranks, []
    for ring_size in (size for size in range(1, ranks + 1) if ranks % size == 0):
        ulysses_size = ranks // ring_size
        for chunks in (1, 2, 4):
            if ulysses_size * chunks <= settings.heads and (chunks == 1 or ring_size in (1, ranks)):
                found.append((ulysses_size, ring_size, chunks))
    return found


def formula(case: Case) -> list[Sent]:
    """What each rank should send; see docs/parallelism.md."""
    rounds = spread_heads(case.heads, case.kv_heads, case.ulysses_size, case.head_chunks)
    ring = ring_tokens(list(case.lengths), case.ring_size, causal=case.causal, window=case.window)
    tokens = sum(case.lengths) // (case.ulysses_size * case.ring_size)
    return mesh_sent(
        case.ulysses_size,
        ring,
        rounds,
        tokens,
        head_dim=case.head_dim,
        itemsize=case.dtype.itemsize,
        parts=case.parts,
        biased=case.form == "biased",
    )


def scheme_rows(settings: AttentionSettings) -> list[dict[str, Any]]:
    """One row a scheme and mask: bytes and messages of the busiest rank, and whether all ranks' equal the formula."""
    rows = []
    # What a bias and parts send does not depend on the mask, and only Ulysses carries them.
    forms = [(causal, "plain", scheme) for causal in (True, False) for scheme in schemes(settings)]
    forms += [
        (True, form, scheme) for form in ("biased", "parts") for scheme in schemes(settings) if scheme[1] == 1
    ]
    for causal, form, (ulysses_size, ring_size, chunks) in forms:
        case = settings.case(ulysses_size, ring_size, chunks, causal=causal, form=form)
        counted = count(case)
        sent = [Sent(rank.forward_sent, rank.backward_sent) for rank in counted]
        rows.append(
            {
                "ulysses_size": ulysses_size,
                "ring_size": ring_size,
                "head_chunks": chunks,
                "causal": causal,
                "form": form,
                "equals_formula": sent == formula(case),
                "forward_sent_mean": sum(rank.forward for rank in sent) / len(sent),
                "backward_sent_mean": sum(rank.backward for rank in sent) / len(sent),
            }
            | {name: max(asdict(rank)[name] for rank in counted) for name in Counted.__annotations__}
        )
    return rows


def balance_rows(settings: AttentionSettings) -> list[dict[str, Any]]:
    """Causal attention work of a ring, the most of a rank over the mean, by layout alone; worst of three rows.

    Raises:
        DataError: ``lengths_from`` holds no shards, or damaged ones.
    """
    rows = []
    laws: list[tuple[Any, Any]] = [
        (law, law) for law in (None, settings.documents or (8100, 0.7), (8000, 1.5), (1000, 1.6))
    ]
    if settings.lengths_from:
        store = ShardStore(settings.lengths_from)
        laws.append((str(store.path), store.lengths))
    for ranks in settings.balance_ranks:
        for name, law in laws:
            ratios = []
            for seed in range(1 if law is None else 3):
                lengths = document_lengths(ranks * settings.balance_tokens, law, seed)
                work = np.array([held.causal_work() for held in deal([lengths], ranks)], dtype=float)
                ratios.append(float(work.max() / work.mean()))
            rows.append({"ring_size": ranks, "documents": name, "max_over_mean": max(ratios)})
    return rows


def run_attention(settings: AttentionSettings, json_file: Path | None) -> int:
    """Print the tables; 1 when a count is not the formula or the work is not balanced."""
    sent, balance = scheme_rows(settings), balance_rows(settings)
    console = Console(width=max(Console().width, TABLE_WIDTH))
    console.print(_sent_table(settings, sent))
    console.print(_balance_table(settings, balance))
    if json_file:
        record = {"settings": asdict(settings), "schemes": sent, "balance": balance}
        json_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    good = all(row["equals_formula"] for row in sent)
    good &= all(row["max_over_mean"] <= (1.05 if row["documents"] else 1.02) for row in balance)
    return 0 if good else 1


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _sent_table(settings: AttentionSettings, rows: Sequence[dict[str, Any]]) -> Table:
    title = (
        f"One layer, {settings.ranks} ranks x {settings.tokens} tokens, {settings.heads} heads of {settings.head_dim}, "
        f"{settings.kv_heads} for keys, bf16; MB of the busiest rank (mean)"
    )
    columns = [
        "U x ring",
        "chunks",
        "attention",
        "sent forward",
        "sent backward",
        "= formula",
        "buffers fwd",
        "bwd",
    ]
    table = _table(title, columns)
    for row in rows:
        table.add_row(
            f"{row['ulysses_size']} x {row['ring_size']}",
            str(row["head_chunks"]),
            row["form"] if row["form"] != "plain" else "causal" if row["causal"] else "both ways",
            *(
                f"{row[f'{way}_sent'] / 1e6:.2f} ({row[f'{way}_sent_mean'] / 1e6:.2f})"
                for way in ("forward", "backward")
            ),
            "yes" if row["equals_formula"] else "NO",
            *(f"{row[f'{way}_peak'] / 1e6:.2f}" for way in ("forward", "backward")),
        )
    return table


def _balance_table(settings: AttentionSettings, rows: Sequence[dict[str, Any]]) -> Table:
    title = f"Causal attention work, max over mean, {settings.balance_tokens} tokens a rank"
    table = _table(title, ["ring_size", "documents", "max / mean"])
    for row in rows:
        law = row["documents"]
        if isinstance(law, str):
            name = "as in " + law.rstrip("/").rpartition("/")[2]
        else:
            name = "one a row" if law is None else f"median {law[0]:,}, sigma {law[1]}"
        table.add_row(str(row["ring_size"]), name, f"{row['max_over_mean']:.4f}")
    return table
