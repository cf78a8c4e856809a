"""From an undecoded record to a document, or to the reason why it is none."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from roformer_dist.data.errors import DataError
from roformer_dist.data.inputs import InputFile
from roformer_dist.data.records import Record, read_records

PARENT = "parent"
STOP, SKIP = "stop", "skip"


@dataclass(frozen=True)
class TextOptions:
    """How documents are read.

    Attributes:
        text_column: the field of a JSON line, or the column of a table, that holds the text.
        group_by: the field or column that says what a document belongs to, ``parent`` for the folder of a
            text file, or None.
        encoding: of text files, a codec that Python knows; JSON and parquet are always UTF-8.
        errors: ``strict`` refuses bytes that the codec does not know, ``replace`` writes U+FFFD for them.
        on_bad: ``stop`` at a record that holds no document, or ``skip`` and count it.
    """

    text_column: str = "text"
    group_by: str | None = None
    encoding: str = "utf-8"
    errors: str = "strict"
    on_bad: str = STOP

    def check(self, files: Sequence[InputFile]) -> None:
        """Raise ``DataError`` for a choice that does not exist or that does not fit ``files``."""
        if self.errors not in ("strict", "replace"):
            raise DataError(f"--errors {self.errors}: choose strict or replace")
        if self.on_bad not in (STOP, SKIP):
            raise DataError(f"--on-bad-document {self.on_bad}: choose {STOP} or {SKIP}")
        try:
            utf8 = codecs.lookup(self.encoding).name == "utf-8"
            b"a".decode(self.encoding, "ignore")  # some make no text of bytes
        except (LookupError, UnicodeError):
            raise DataError(
                f"--encoding {self.encoding}: no such encoding; utf-8, latin-1, cp1252 are some"
            ) from None
        for file in files:
            if file.kind == "text" and self.group_by not in (None, PARENT):
                raise DataError(
                    f"--group-by {self.group_by}: {file.name} is a text file and has no such column; "
                    f"give --group-by {PARENT}, which is its folder"
                )
            if file.kind != "text" and not utf8:
                raise DataError(
                    f"--encoding {self.encoding}: {file.name} is always UTF-8; leave the option out, "
                    "or build from the text files alone"
                )


@dataclass(frozen=True)
class Document:
    """A text and the key of its group, None when it has none."""

    text: str
    group: str | None


class BadDocument(ValueError):
    """A record without a document: ``reason`` is one of a few, to count; the message has the details."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def decode(record: Record, options: TextOptions) -> Document:
    """The document of ``record``; raises ``BadDocument``."""
    if record.data is None:
        raise BadDocument("not a string", "the text is null, not a string")
    if record.kind == "text":
        text, group = _decode_bytes(record.data, options.encoding, options.errors), record.group
    elif record.kind == "parquet":
        text, group = _decode_bytes(record.data, "utf-8", options.errors), record.group
    else:
        text, group = _decode_line(record.data, options)
    if not text:
        raise BadDocument("empty", "the document is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadDocument(
            "undecodable",
            f"character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}, which is not text",
        ) from None
    if group is not None:
        try:
            group.encode("utf-8")
        except UnicodeEncodeError:
            raise BadDocument("bad group", f"the group {group!a} is not text in UTF-8") from None
    return Document(text, group)


def _decode_bytes(data: bytes, encoding: str, errors: str) -> str:
    try:
        return data.decode(encoding, errors)
    except UnicodeDecodeError as error:
        raise BadDocument("undecodable", f"not {encoding.upper()} at byte {error.start}") from None


def _decode_line(data: bytes, options: TextOptions) -> tuple[str, str | None]:
    try:
        value = json.loads(_decode_bytes(data.rstrip(b"\r\n"), "utf-8", options.errors))
    except json.JSONDecodeError as error:
        raise BadDocument("not JSON", f"not JSON ({error.msg} at character {error.pos})") from None
    except RecursionError:
        raise BadDocument("not JSON", "not JSON that can be read (too deeply nested)") from None
    except BadDocument:
        raise
    except ValueError as error:  # a whole number of more digits than Python converts
        raise BadDocument("not JSON", f"not JSON that can be read ({str(error).partition(';')[0]})") from None
    if not isinstance(value, dict):
        raise BadDocument("not an object", f"a JSON {type(value).__name__}, not an object with fields")
    if options.text_column not in value:
        names = ", ".join(list(value)[:20])
        raise BadDocument("no text", f"no field {options.text_column!r} (--text-column); it has: {names}")
    text = value[options.text_column]
    if not isinstance(text, str):
        raise BadDocument(
            "not a string", f"field {options.text_column!r} holds {type(text).__name__}, not a string"
        )
    group = value.get(options.group_by) if options.group_by is not None else None
    if isinstance(group, int) and not isinstance(group, bool):
        group = str(group)
    if group is not None and not isinstance(group, str):
        raise BadDocument(
            "bad group",
            f"field {options.group_by!r} holds {type(group).__name__}, not a string or whole number",
        )
    return text, group


def located(file: InputFile, record: Record, problem: BadDocument) -> str:
    """One line for ``problem``: the file, the line or row, and what can be done."""
    place = {"text": "", "jsonl": f":{record.position + 1}", "parquet": f" row {record.position}"}[
        record.kind
    ]
    fix = "correct it, or give --on-bad-document skip to leave such documents out and count them"
    if problem.reason == "undecodable" and record.kind == "text":
        fix = (
            "name the files' own with --encoding (such as latin-1), give --errors replace to write U+FFFD for "
            "such bytes, or --on-bad-document skip"
        )
    return f"{file.shown}{place}: {problem}; {fix}"


def read_texts(
    files: Sequence[InputFile],
    options: TextOptions,
    *,
    skipped: Counter[str] | None = None,
    progress: Callable[[int], None] = lambda size: None,
) -> Iterator[str]:
    """Every document's text in order; raises ``DataError`` at a bad one, or counts it in ``skipped``."""
    options.check(files)
    for number, file in enumerate(files):
        for record in read_records(
            number, file, text_column=options.text_column, group_by=None, progress=progress
        ):
            try:
                yield decode(record, options).text
            except BadDocument as problem:
                if options.on_bad == STOP:
                    raise DataError(located(file, record, problem)) from None
                if skipped is not None:
                    skipped[problem.reason] += 1
