"""``data pack``, ``inspect`` and ``verify``: plans, and a look at what was made.

Whatever needs numpy or sentencepiece is imported inside the command, so that ``--help`` is quick.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from data_tools import display
from data_tools.display import Json

Shards = Annotated[
    Path | None, typer.Option("--shards", help="For a plan: the shards folder it was packed from.")
]


def pack(
    shards: Annotated[Path, typer.Option(help="The folder of 'data shards'.")],
    seq_len: Annotated[int, typer.Option(help="Tokens of a row.")],
    out: Annotated[Path, typer.Option(help="The .npz plan to write; an existing one is replaced.")],
    method: Annotated[
        str, typer.Option(help="best-fit (fewest cut documents), concat, or bucket.")
    ] = "best-fit",
    seed: Annotated[int, typer.Option(help="Shuffles which documents share a row.")] = 0,
    as_json: Json = False,
) -> None:
    """Pack documents into rows of one length; long documents are split, none is truncated.

    Example: roformer-dist data pack --shards shards/train --seq-len 8192 --out train_8192.npz
    """
    from roformer_dist.data.packing import make_plan
    from roformer_dist.data.store import ShardStore

    started = time.perf_counter()
    store = ShardStore(shards)
    plan = make_plan(store, seq_len, method=method, seed=seed)
    plan.save(out)
    values = {
        "out": str(out),
        "method": plan.method,
        "seq_len": plan.seq_len,
        "rows": plan.num_rows,
        "documents": len(store),
        "pieces": len(plan.length),
        "tokens": plan.num_tokens,
        "padding_percent": round(100 * plan.padding, 4),
        "hash": plan.hash,
        "seconds": round(time.perf_counter() - started, 2),
    }
    display.report("Plan", values, as_json=as_json)


def inspect(
    path: Annotated[Path, typer.Argument(help="A shards folder, or a plan.")],
    document: Annotated[int, typer.Option(help="For a shards folder: which document.")] = 0,
    row: Annotated[int, typer.Option(help="For a plan: which row.")] = 0,
    shards: Shards = None,
    as_json: Json = False,
) -> None:
    """Show a document of a shards folder, or a row of a plan with its boundaries in colour.

    Example: roformer-dist data inspect train_8192.npz --shards shards/train --row 3
    """
    from data_tools.inspection import describe_document, describe_row

    summary, pieces = describe_document(path, document) if path.is_dir() else describe_row(path, row, shards)
    if not as_json:
        display.print_pieces(pieces)
    display.report(f"Inspected {path}", summary, as_json=as_json)


def verify(
    path: Annotated[Path, typer.Argument(help="A shards folder, or a plan.")],
    shards: Shards = None,
    as_json: Json = False,
) -> None:
    """Check every hash of a shards folder or a plan; exit code 1 when a check fails.

    With --shards, a plan is also checked to hold each token of those shards exactly once.

    Example: roformer-dist data verify shards/train
    """
    from data_tools.inspection import checks

    results: list[str | None] = []
    with display.progress_bar("Verifying", None) as advance:
        for _, problem in checks(path, shards):
            results.append(problem)
            advance()
    problems = [problem for problem in results if problem]
    for problem in problems:
        typer.echo(problem, err=True)
    values = {"path": str(path), "checks": len(results), "problems": problems if as_json else len(problems)}
    display.report(f"Verified {path}", values, as_json=as_json)
    if problems:
        raise typer.Exit(1)
