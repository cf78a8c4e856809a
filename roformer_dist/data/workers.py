"""Encoding records in worker processes; results come in the order of the records, whatever the number."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from roformer_dist.data.documents import BadDocument, TextOptions, decode
from roformer_dist.data.errors import DataError
from roformer_dist.data.json_tokenizer import AnyTokenizer, open_tokenizer
from roformer_dist.data.records import Record

Batch = Sequence[Record]
# For each worker: one batch that it encodes, and this many that are read, or wait for their turn to be written.
_AHEAD = 3


class Encoded(NamedTuple):
    """A document as tokens.

    Attributes:
        data: its ids and EOS in the shards' type.
        sha256: of the text as UTF-8, which has ``text_bytes``.
    """

    file: int
    position: int
    data: bytes
    text_bytes: int
    sha256: bytes
    group: str | None


class Bad(NamedTuple):
    """A record without a document, and why; it comes back whole, for the message."""

    record: Record
    reason: str
    message: str


@dataclass(frozen=True)
class Encoder:
    """What turns a batch into results; it travels to the workers.

    Attributes:
        tokenizer: the model file, whose ``fingerprint`` is ``tokenizer_fingerprint``.
        dtype: the shards' type of an id.
    """

    tokenizer: Path
    tokenizer_fingerprint: str
    dtype: str
    options: TextOptions

    def load(self) -> AnyTokenizer:
        """The tokenizer; raises ``DataError`` when the file is not the one it was."""
        tokenizer = open_tokenizer(self.tokenizer)
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise DataError(f"{self.tokenizer}: changed while shards were written; start again")
        return tokenizer

    def encode(self, tokenizer: AnyTokenizer, batch: Batch) -> list[Encoded | Bad]:
        """One result for each record, in order."""
        return [self._encode_one(tokenizer, record) for record in batch]

    def _encode_one(self, tokenizer: AnyTokenizer, record: Record) -> Encoded | Bad:
        try:
            document = decode(record, self.options)
        except BadDocument as problem:
            return Bad(record._replace(data=None), problem.reason, str(problem))
        ids = np.append(tokenizer.encode(document.text), tokenizer.eos_id)
        text = document.text.encode()
        return Encoded(
            record.file,
            record.position,
            ids.astype(np.dtype(self.dtype).newbyteorder("<")).tobytes(),
            len(text),
            hashlib.sha256(text).digest(),
            document.group,
        )


def encode_batches(encoder: Encoder, batches: Iterable[Batch], workers: int) -> Iterator[list[Encoded | Bad]]:
    """The results of every batch, in order; one worker is this process itself.

    Raises:
        DataError: a worker failed or died. All others are ended first.
    """
    if workers == 1:
        tokenizer = encoder.load()
        for batch in batches:
            yield encoder.encode(tokenizer, batch)
        return
    pool = _Pool(encoder, workers)
    try:
        yield from pool.run(iter(batches))
    finally:
        pool.end()


class _Pool:
    """Worker processes, each with a pipe of its own: a death on either side closes the pipe and is seen at once."""

    def __init__(self, encoder: Encoder, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._workers: dict[Connection, BaseProcess] = {}
        self._ready: deque[tuple[int, Batch]] = deque()
        self._results: dict[int, list[Encoded | Bad]] = {}
        with _interrupts_ignored():
            for number in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(theirs, encoder), name=f"encoder-{number}", daemon=True
                )
                process.start()
                theirs.close()
                self._workers[ours] = process

    def run(self, batches: Iterator[Batch]) -> Iterator[list[Encoded | Bad]]:
        """Hand out batches, hand on results in order; what is held at a time is bounded."""
        idle = list(self._workers)
        busy: set[Connection] = set()
        taken = handed_on = 0
        exhausted = False
        while True:
            while idle and self._ready:
                connection = idle.pop()
                self._send(connection, self._ready.popleft())
                busy.add(connection)
            while handed_on in self._results:
                yield self._results.pop(handed_on)
                handed_on += 1
            if not exhausted and taken - handed_on < (1 + _AHEAD) * len(self._workers):
                batch = next(batches, None)
                exhausted = batch is None
                if batch is not None:
                    self._ready.append((taken, batch))
                    taken += 1
            elif not busy and not self._ready:
                return
            if not busy:
                continue
            # While there is something to read or to hand out, a look at the results is enough.
            blocked = exhausted or taken - handed_on >= (1 + _AHEAD) * len(self._workers)
            for connection in wait(list(busy), None if blocked and not (idle and self._ready) else 0):
                assert isinstance(connection, Connection)
                number, result = self._receive(connection)
                self._results[number] = result
                busy.remove(connection)
                idle.append(connection)

    def end(self) -> None:
        """End all workers, whatever they are doing."""
        for connection, process in self._workers.items():
            process.kill()
            connection.close()
        for process in self._workers.values():
            process.join()

    def _send(self, connection: Connection, work: tuple[int, Batch]) -> None:
        try:
            connection.send(work)
        except OSError:
            raise self._death(connection) from None

    def _receive(self, connection: Connection) -> tuple[int, list[Encoded | Bad]]:
        try:
            number, result = connection.recv()
        except (EOFError, OSError):
            raise self._death(connection) from None
        if isinstance(result, str):
            raise DataError(result)
        return number, result

    def _death(self, connection: Connection) -> DataError:
        process = self._workers[connection]
        process.join(5)
        code = process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return DataError(
            f"a worker process ended ({how}; SIGKILL often means that memory ran out); run the same command "
            "again and it goes on after the last finished shard, with fewer --workers if memory is short"
        )


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started inside never see Ctrl-C: ending them is for the one that started them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(connection: Connection, encoder: Encoder) -> None:
    """The life of a worker: it ends when the other end of its pipe is closed, also by a kill."""
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        tokenizer: Any = None
        while True:
            number, batch = connection.recv()
            try:
                tokenizer = tokenizer or encoder.load()
                result: Any = encoder.encode(tokenizer, batch)
            except DataError as error:
                result = str(error)
            except Exception as error:
                result = f"a worker failed: {type(error).__name__}: {' '.join(str(error).split())}"
            connection.send((number, result))
