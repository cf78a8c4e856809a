"""A real HTTP server of a folder or in front of another, on loopback, in a thread, with scripted faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import requests

Fault = Callable[[Any, bytes], None]


class FaultyServer:
    """Serves the files below ``folder``, or what the server at ``upstream`` answers.

    Attributes:
        url: of the folder.
        requests: the path of every GET, in order.
        faults: by file name, what answers the next requests instead of the file, one each.
        always: by file name, what answers every request.
        body_seconds: a wait before each body.
    """

    def __init__(self, folder: Path, upstream: str | None = None) -> None:
        self.folder, self.upstream = folder, upstream
        self.requests: list[str] = []
        self.faults: dict[str, list[Fault]] = {}
        self.always: dict[str, Fault] = {}
        self.body_seconds = 0.0
        self.closing = threading.Event()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer._answer(self)

            def do_HEAD(self) -> None:
                if outer.upstream is None:
                    self.send_error(501)
                else:
                    outer._relay(self, outer._ask(self))

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that hangs up is part of the tests

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def count(self, name: str) -> int:
        """How often a file was asked for."""
        with self._lock:
            return sum(path.rpartition("/")[2] == name for path in self.requests)

    def close(self) -> None:
        """Stop, faults that wait included."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        name = path.rpartition("/")[2]
        with self._lock:
            self.requests.append(path)
            waiting = self.faults.get(name)
            fault = waiting.pop(0) if waiting else self.always.get(name)
        if self.upstream is not None:
            answer = self._ask(request)
            if fault is None:
                self._relay(request, answer)
            else:
                fault(request, answer.content)
            return
        file = self.folder / path.lstrip("/")
        if fault is None and not file.is_file():
            fault = status(404)
        data = file.read_bytes() if file.is_file() else b""
        if fault is not None:
            fault(request, data)
            return
        head(request, 200, len(data))
        time.sleep(self.body_seconds)
        request.wfile.write(data)

    def _ask(self, request: BaseHTTPRequestHandler) -> requests.Response:
        """What the server behind this one answers."""
        url, headers = f"{self.upstream}{request.path}", dict(request.headers)
        return requests.request(request.command, url, headers=headers, timeout=60)

    @staticmethod
    def _relay(request: BaseHTTPRequestHandler, answer: requests.Response) -> None:
        request.send_response(answer.status_code)
        for name, value in answer.headers.items():
            if name.lower() not in ("connection", "date", "server", "transfer-encoding"):
                request.send_header(name, value)
        request.end_headers()
        request.wfile.write(answer.content)


@contextmanager
def serving(folder: Path, upstream: str | None = None) -> Iterator[FaultyServer]:
    """A server while the block runs."""
    server = FaultyServer(folder, upstream)
    try:
        yield server
    finally:
        server.close()


def head(request: Any, code: int, length: int | None) -> None:
    """Status line and headers."""
    request.send_response(code)
    if length is not None:
        request.send_header("Content-Length", str(length))
    request.end_headers()


def status(code: int) -> Fault:
    """An answer without the file."""

    def answer(request: Any, data: bytes) -> None:
        head(request, code, 0)

    return answer


def short(request: Any, data: bytes) -> None:
    """Half of the body, though all of it was announced."""
    head(request, 200, len(data))
    request.wfile.write(data[: len(data) // 2])


def short_without_length(request: Any, data: bytes) -> None:
    """Half of the body, and nothing to know it by."""
    head(request, 200, None)
    request.wfile.write(data[: len(data) // 2])


def cut(request: Any, data: bytes) -> None:
    """Half of the body, announced as all there is: a file that was uploaded in part."""
    head(request, 200, len(data) // 2)
    request.wfile.write(data[: len(data) // 2])


def hang_up(request: Any, data: bytes) -> None:
    """The connection ends before a status."""
    request.connection.close()


def other_bytes(request: Any, data: bytes) -> None:
    """A body of the right size that is not the file's."""
    head(request, 200, len(data))
    request.wfile.write(bytes(byte ^ 1 for byte in data))


def stall(server: FaultyServer) -> Fault:
    """A quarter of the body, then silence."""

    def answer(request: Any, data: bytes) -> None:
        head(request, 200, len(data))
        request.wfile.write(data[: len(data) // 4])
        server.closing.wait(60)

    return answer


def silent(server: FaultyServer) -> Fault:
    """The request is read and never answered."""

    def answer(request: Any, data: bytes) -> None:
        server.closing.wait(60)

    return answer


def drip(server: FaultyServer, size: int, seconds: float) -> Fault:
    """``size`` bytes every so many ``seconds``, without end."""

    def answer(request: Any, data: bytes) -> None:
        head(request, 200, 2**40)
        while not server.closing.wait(seconds):
            request.wfile.write(bytes(size))

    return answer
