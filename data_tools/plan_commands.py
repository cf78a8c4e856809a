"""``data pack``, ``inspect`` and ``verify``: plans, and a look at what was made.

Whatever needs numpy or sentencepiece is imported inside the command, so that ``--help`` is quick.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_tools import display, figures
from data_tools.display import Json

if TYPE_CHECKING:
    from roformer_dist.data.plan import PackOptions

Shards = Annotated[
    str | None, typer.Option("--shards", help="For a plan: the shards folder or URL it was packed from.")
]


def pack(
    shards: Annotated[str, typer.Option(help="The folder of 'data shards', or its URL.")],
    seq_len: Annotated[int, typer.Option(help="Tokens of a row; of the longest row for buckets.")],
    out: Annotated[
        Path, typer.Option(help="The .npz plan to write, replaced if there; for buckets a new folder.")
    ],
    method: Annotated[
        str, typer.Option(help="best-fit (fewest cut documents), concat, or bucket (one piece a row).")
    ] = "best-fit",
    seed: Annotated[int, typer.Option(help="Shuffles which documents share a row, and the rows.")] = 0,
    document_mask: Annotated[
        bool, typer.Option(help="Whether attention and positions stop at the documents of a row.")
    ] = True,
    group_by_key: Annotated[
        bool, typer.Option("--group-by-key", help="Lay the documents of one group next to each other.")
    ] = False,
    upsample: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MIN:FACTOR",
            help="What has at least MIN tokens is laid out FACTOR times; may be repeated, the largest MIN counts.",
        ),
    ] = None,
    max_padding: Annotated[
        float | None,
        typer.Option(
            help="best-fit: cut documents to fill rows above this fraction; 1 never. [default: 0.001]"
        ),
    ] = None,
    min_len: Annotated[
        int | None, typer.Option(help="bucket: tokens of the shortest row. [default: 256]")
    ] = None,
    shards_per_group: Annotated[int, typer.Option(help="Shards whose documents may share a row.")] = 8,
    window: Annotated[int, typer.Option(help="Shard groups that are read at a time in training.")] = 4,
    as_json: Json = False,
) -> None:
    """Pack documents into rows of one length; long documents are split, none is truncated.

    Example: roformer-dist data pack --shards shards/train --seq-len 8192 --out train_8192.npz
    """
    from roformer_dist.data.plan import PackOptions

    options = PackOptions(
        method=method,
        seed=seed,
        document_mask=document_mask,
        shards_per_group=shards_per_group,
        window=window,
        group_by_key=group_by_key,
        upsample=tuple(_rule(text) for text in upsample or []),
        max_padding=max_padding,
        min_len=min_len,
    )
    values, buckets = _packed(shards, seq_len, options, out)
    if as_json and buckets is not None:
        values["buckets"] = buckets
    display.report("Plan", values, as_json=as_json)
    if buckets is not None and not as_json:
        figures.print_table("Buckets", buckets)


def _packed(
    shards: str, seq_len: int, options: PackOptions, out: Path
) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
    """Pack, write the plans, and return the closing table and that of the buckets."""
    from data_tools.packing_report import pack_counts
    from roformer_dist.data.files import check_file_out, check_folder_out
    from roformer_dist.data.packing import checked, make_plans, save_plans
    from roformer_dist.data.store import ShardStore

    checked(options, seq_len)
    if options.method == "bucket":
        check_folder_out(out)
    else:
        check_file_out(out, f"train_{seq_len}.npz")
    with ShardStore(shards) as store:
        started = time.process_time()
        plans = make_plans(store, seq_len, options)
        seconds = time.process_time() - started
        save_plans(plans, out)
        counts = pack_counts(plans, store.lengths)
    buckets = counts.pop("buckets", None)
    values = {
        "out": str(out),
        "method": options.method,
        "seq_len": seq_len,
        "document_mask": options.document_mask,
        **counts,
        "microseconds_per_document": round(1e6 * seconds / counts["documents"], 2),
    }
    if buckets is None:
        values["hash"] = plans[0].hash
    return values, buckets


def _rule(text: str) -> tuple[int, float]:
    from roformer_dist.data.errors import DataError

    tokens, colon, factor = text.partition(":")
    try:
        if colon:
            return int(tokens), float(factor)
    except ValueError:
        pass
    raise DataError(f"--upsample {text}: give MIN_TOKENS:FACTOR, such as 32768:2.5")


def inspect(
    path: Annotated[str, typer.Argument(help="A shards folder or its URL, a plan, or a folder of buckets.")],
    document: Annotated[int | None, typer.Option(help="Show this document of a shards folder.")] = None,
    row: Annotated[int | None, typer.Option(help="Show this row of a plan.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Buckets: whose row to show.")] = None,
    shards: Shards = None,
    as_json: Json = False,
) -> None:
    """Show lengths and how full the rows are; or a document; or a row with its boundaries in colour.

    With --shards, a row is shown with its text. --json prints all numbers, and the text whole.

    Example: roformer-dist data inspect train_8192.npz --shards shards/train --row 3
    """
    from data_tools import inspection

    inspection.check_choice(path, document=document, row=row, shards=shards, seq_len=seq_len)
    pieces: inspection.Pieces = []
    if not inspection.is_plan(path):
        values, pieces = inspection.describe_document(path, document)
    elif row is not None:
        values, pieces = inspection.describe_row(path, row, shards, seq_len)
    else:
        values = inspection.describe_plan(path)
    if as_json:
        display.report(f"Inspected {path}", values, as_json=True)
        return
    display.print_pieces(pieces)
    _print_figures(values)
    figured = ("text", "document_lengths", "piece_lengths", "row_fill", "buckets")
    shown = {name: value for name, value in values.items() if name not in figured}
    if "pieces" in shown:
        shown["pieces"] = len(shown["pieces"])
    display.report(f"Inspected {path}", shown, as_json=False)


def _print_figures(values: dict[str, Any]) -> None:
    for name in ("document", "piece"):
        if histogram := values.get(f"{name}_lengths"):
            figures.print_lengths(f"Tokens of a {name}", histogram)
    if fill := values.get("row_fill"):
        labels = [
            "full" if part["from_percent"] == 100 else f"from {part['from_percent']} %" for part in fill
        ]
        figures.print_bars("How full the rows are", [(a, part["rows"], "") for a, part in zip(labels, fill)])
    if buckets := values.get("buckets"):
        figures.print_table("Rows", buckets)


def verify(
    path: Annotated[str, typer.Argument(help="A shards folder or its URL, a plan, or a folder of buckets.")],
    shards: Shards = None,
    as_json: Json = False,
) -> None:
    """Check every hash of a shards folder or a plan; exit code 1 when a check fails.

    With --shards, a plan is also checked to hold each token of those shards as often as it must.

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
    values = {"path": path, "checks": len(results), "problems": problems if as_json else len(problems)}
    display.report(f"Verified {path}", values, as_json=as_json)
    if problems:
        raise typer.Exit(1)
