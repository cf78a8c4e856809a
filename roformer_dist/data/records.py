"""Reading a file of documents record by record, in a bounded amount of memory.

A record is what holds one document, still undecoded: a whole text file, a line, or a row. Decoding is
``roformer_dist.data.documents``' part, because it can be done elsewhere.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from roformer_dist.data.errors import DataError
from roformer_dist.data.inputs import InputChanged, InputFile, Kind, reading

_READ = 2**20
_ROWS_BYTES = 2**22  # of a table, uncompressed, that are held at a time
_MISSING = 'needs {0}: pip install "roformer-dist[formats]"'


class Record(NamedTuple):
    """An undecoded document: ``position`` in its file counts from 0; ``data`` None is a table's null."""

    file: int
    position: int
    kind: Kind
    data: bytes | None
    group: str | None


class _Source(io.RawIOBase):
    """Hands on a file's bytes; hashes and counts them."""

    def __init__(self, file: IO[bytes], progress: Callable[[int], None]) -> None:
        self._file, self._progress = file, progress
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self.digest.update(data)
        self._progress(len(data))
        buffer[: len(data)] = data
        return len(data)


def read_records(
    number: int,
    file: InputFile,
    *,
    text_column: str,
    group_by: str | None,
    sha256: str | None = None,
    first: int = 0,
    progress: Callable[[int], None] = lambda size: None,
) -> Iterator[Record]:
    """The records of ``file`` from position ``first`` on.

    Args:
        number: what ``Record.file`` says.
        sha256: of the file as it should be.
        progress: called with the number of the file's bytes that were read since its last call.

    Raises:
        InputChanged: the bytes read are not those of ``sha256``.
        DataError: the file cannot be read, is damaged, or is a table without the columns.
    """
    with file.local(sha256) as path:
        if file.kind == "parquet":
            version = path.stat().st_mtime_ns, path.stat().st_size
            yield from _rows(number, file, path, text_column, group_by, first, progress)
            if version != (path.stat().st_mtime_ns, path.stat().st_size):
                raise InputChanged.of(file.shown)
            return
        with reading(file.shown), open(path, "rb") as raw:
            source = _Source(raw, progress)
            stream = io.BufferedReader(source, _READ)
            if file.kind == "text":
                data = stream.read()
                if first == 0:
                    yield Record(number, 0, "text", data, None if group_by is None else file.folder)
            else:
                for position, line in enumerate(_lines(file, stream)):
                    if position >= first:
                        yield Record(number, position, "jsonl", line, None)
            if sha256 is not None and source.digest.hexdigest() != sha256:
                raise InputChanged.of(file.shown)


def _lines(file: InputFile, stream: IO[bytes]) -> Iterator[bytes]:
    try:
        if file.suffix == ".jsonl.gz":
            yield from gzip.GzipFile(fileobj=stream, mode="rb")
        elif file.suffix == ".jsonl.zst":
            yield from io.BufferedReader(_Unzstd(file, stream), _READ)
        else:
            yield from stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file.shown}: damaged gzip file ({error}); restore it") from None


class _Unzstd(io.RawIOBase):
    """The content of all zstd frames. zstandard's own reader ends quietly inside a cut-off frame; this does not."""

    def __init__(self, file: InputFile, stream: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{file.shown}: {_MISSING.format('zstandard')}") from None
        self._error = zstandard.ZstdError
        self._file, self._stream = file, stream
        # Frames of zstd --long=31 too.
        self._new = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._stream.read(2**16)
            if not self._input:
                if self._frame is not None:
                    raise DataError(f"{self._file.shown}: ends inside a zstd frame; restore the file")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._output = self._frame.decompress(self._input)
            except self._error as error:
                raise DataError(f"{self._file.shown}: damaged zstd file ({error}); restore it") from None
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def _rows(
    number: int,
    file: InputFile,
    path: Path,
    text_column: str,
    group_by: str | None,
    first: int,
    progress: Callable[[int], None],
) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{file.shown}: {_MISSING.format('pyarrow')}") from None
    try:
        with reading(file.shown), pyarrow.parquet.ParquetFile(path) as table:
            _check_columns(file, table.schema_arrow, text_column, group_by)
            groups, position = range(table.num_row_groups), 0
            reported = 0
            for group in groups:
                rows = table.metadata.row_group(group).num_rows
                if position + rows <= first:
                    position += rows
                    continue
                for record in _row_group(table, group, number, position, text_column, group_by):
                    if record.position >= first:
                        yield record
                position += rows
                share = file.size * position // max(1, table.metadata.num_rows)
                progress(share - reported)
                reported = share
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file.shown}: not a readable parquet file ({reason}); restore it") from None


def _row_group(
    table: Any, group: int, number: int, position: int, text_column: str, group_by: str | None
) -> Iterator[Record]:
    import pyarrow

    facts = table.metadata.row_group(group)
    rows = max(1, min(4096, _ROWS_BYTES * facts.num_rows // max(1, facts.total_byte_size)))
    columns = [text_column] if group_by is None else [text_column, group_by]
    for batch in table.iter_batches(rows, row_groups=[group], columns=list(dict.fromkeys(columns))):
        # As bytes: whether they are UTF-8 is found out for each document.
        texts = batch.column(text_column).cast(pyarrow.large_binary()).to_pylist()
        keys: list[Any] = [None] * len(texts)
        if group_by is not None:
            column = batch.column(group_by)
            column = column if _is_text(column.type) else column.cast(pyarrow.string())
            keys = column.cast(pyarrow.large_binary()).to_pylist()
        for text, key in zip(texts, keys):
            # Bytes that are not UTF-8 stay to be seen, as a group that cannot be encoded.
            group_key = None if key is None else key.decode("utf-8", "surrogateescape")
            yield Record(number, position, "parquet", text, group_key)
            position += 1


def _check_columns(file: InputFile, schema: Any, text_column: str, group_by: str | None) -> None:
    import pyarrow.types as types

    for option, column in (("--text-column", text_column), ("--group-by", group_by)):
        if column is None:
            continue
        if column not in schema.names:
            raise DataError(
                f"{file.shown}: no column {column!r} ({option}); it has: {', '.join(schema.names)}"
            )
        if (count := schema.names.count(column)) > 1:
            raise DataError(
                f"{file.shown}: {count} columns are named {column!r} ({option}); rename them, or choose another"
            )
        kind = schema.field(column).type
        inner = kind.value_type if types.is_dictionary(kind) else kind
        if not (_is_text(kind) or (option == "--group-by" and types.is_integer(inner))):
            raise DataError(
                f"{file.shown}: column {column!r} ({option}) holds {kind}, not strings; choose another"
            )


def _is_text(kind: Any) -> bool:
    """Whether a column of this Arrow type holds strings."""
    import pyarrow.types as types

    inner = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(inner) or types.is_large_string(inner) or types.is_string_view(inner)
