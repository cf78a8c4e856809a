"""Files behind URLs: one whole file at a time through fsspec, tried again when that can help.

Which error can pass is decided here: timeouts, stalls, broken or short bodies, 408, 425, 429 and 5xx
can; a file that is not there, a refusal or a missing package cannot, and is raised at once.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from roformer_dist.data.errors import DataError
from roformer_dist.data.files import FULL, sha256_file

_TRANSIENT_STATUS = {408, 425, 429}
_ENOUGH = 64 * 2**10  # bytes that count as progress: one at a time would keep a dead transfer alive


@dataclass(frozen=True)
class RetryPolicy:
    """How long to insist, in seconds.

    Attributes:
        stall: an attempt in which less than 64 KiB arrive for so long is over.
        attempt: an attempt that has taken so long is over, even if more than that goes on arriving.
        give_up: no attempt starts later than this after the first.
        first_wait, longest_wait: bounds of the exponential backoff; each wait is drawn between 0 and its bound.
    """

    stall: float = 30.0
    attempt: float = 1800.0
    give_up: float = 300.0
    first_wait: float = 0.5
    longest_wait: float = 30.0


class RefusedError(DataError):
    """What another attempt does not change: no such file, no permission, a missing package."""


class _TransientError(Exception):
    """An attempt that failed in a way that may pass."""


def is_url(path: str | Path) -> bool:
    """Whether ``path`` names a file or folder through fsspec, ``file://`` included."""
    return isinstance(path, str) and "://" in path


def join(root: str, name: str) -> str:
    """The URL of ``name`` in the folder ``root``."""
    return f"{root.rstrip('/')}/{name}"


def without_secrets(url: str) -> str:
    """``url`` without user, password and query, as it may be printed; DataError when it is none."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise DataError(f"{url.partition('?')[0].rpartition('@')[2]}: not a URL ({error})") from None
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def read_bytes(path: str | Path, policy: RetryPolicy = RetryPolicy()) -> bytes:
    """The content of a small file, local or behind a URL.

    Raises:
        FileNotFoundError: no such local file.
        RefusedError: nothing to read at the URL, or no permission.
        DataError: the URL cannot be read; one line with URL, status and time.
    """
    with local_copy(path, policy) as file:
        return file.read_bytes()


@contextmanager
def local_copy(path: str | Path, policy: RetryPolicy = RetryPolicy()) -> Iterator[Path]:
    """A local file with the content of ``path``: itself, or a download that is deleted at the end.

    Raises:
        RefusedError, DataError: as ``read_bytes``.
    """
    if not is_url(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file"
        download(str(path), file, policy=policy)
        yield file


def download(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    policy: RetryPolicy = RetryPolicy(),
) -> bool:
    """Copy the file at ``url`` over the local file ``path`` and check it.

    Returns:
        Whether the content is the expected one. False means that the origin itself is damaged: the same
        wrong content came twice, or three times where its size is wrong too, as a transfer that was cut
        off could be. A transfer that went wrong is tried again.

    Raises:
        DataError: it cannot be read, or comes wrong in another way each time; one line with URL, status and time.
    """
    from tenacity import RetryError, Retrying, retry_if_exception_type, stop_before_delay
    from tenacity.wait import wait_random_exponential

    shown, started, wrong = without_secrets(url), time.monotonic(), Counter[str]()

    def attempt() -> bool:
        _transfer(url, path, policy)
        found = path.stat().st_size
        actual = sha256_file(path) if sha256 else None
        if actual == sha256 and size in (None, found):
            return True
        wrong[str(actual)] += 1
        short = size not in (None, found)
        if sha256 and wrong[str(actual)] == (3 if short else 2):
            return False
        if short:
            raise _TransientError(f"{found} bytes came, expected {size}")
        raise _TransientError(f"sha256 {str(actual)[:16]}…, expected {str(sha256)[:16]}…")

    retrying = Retrying(
        retry=retry_if_exception_type(_TransientError),
        wait=wait_random_exponential(multiplier=policy.first_wait, max=policy.longest_wait),
        stop=stop_before_delay(policy.give_up),
    )
    try:
        return retrying(attempt)
    except RetryError as error:
        seconds, last = time.monotonic() - started, error.last_attempt
        raise DataError(
            f"{shown}: gave up after {last.attempt_number} attempts in {seconds:.0f} s "
            f"(limit {policy.give_up:g} s); the last: {last.exception()}"
        ) from None


def _transfer(url: str, path: Path, policy: RetryPolicy) -> None:
    """One attempt; raises ``_TransientError`` or, for what will not pass, ``RefusedError``."""
    try:
        from fsspec.core import url_to_fs

        fs, inner = url_to_fs(url, **_options(url, policy.stall))
        _watched(fs, inner, path, policy)
    except Exception as error:
        shown, reason = without_secrets(url), _reason(error)
        if isinstance(error, ImportError):
            raise RefusedError(f'{shown}: {reason}; pip install "roformer-dist[remote]"') from None
        if isinstance(error, OSError) and error.errno in FULL:
            raise RefusedError(
                f"{shown}: its copy in {path.parent} cannot be written ({error.strerror}); free space there, or "
                "name another folder: TMPDIR for inputs, data.cache_dir for shards"
            ) from None
        if _may_pass(error):
            raise _TransientError(reason) from None
        raise RefusedError(f"{shown}: {reason}; check the URL and the credentials") from None


def _options(url: str, stall: float) -> dict[str, Any]:
    """What the file system is made with, beside what the user has configured for it in fsspec."""
    from fsspec.config import conf

    protocol = url.partition("://")[0]
    family = next((names for names in (("http", "https"), ("s3", "s3a")) if protocol in names), ())
    chosen: dict[str, Any] = {}
    for name in family:
        chosen |= conf.get(name, {})
    if protocol in ("http", "https"):
        import aiohttp

        # Without it a transfer ends after five minutes, however well it goes.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall)
        return {"client_kwargs": {"timeout": timeout, **chosen.get("client_kwargs", {})}}
    if protocol in ("s3", "s3a"):
        # What the library would try again on its own counts as one attempt here.
        own = {"connect_timeout": stall, "read_timeout": stall, "retries": {"total_max_attempts": 1}}
        # Parts of one file side by side would come without their lengths checked.
        return {"max_concurrency": 1, "config_kwargs": {**own, **chosen.get("config_kwargs", {})}}
    return {}


def _watched(fs: Any, inner: str, path: Path, policy: RetryPolicy) -> None:
    """Copy a file and end that when too little arrives or it takes too long."""
    from fsspec.callbacks import Callback

    callback = Callback()
    future, end = _begin(fs, inner, path, callback)
    started = since = time.monotonic()
    reached = 0
    while True:
        done, _ = concurrent.futures.wait([future], timeout=min(1.0, policy.stall / 4))
        if done:
            return future.result()
        now = time.monotonic()
        if callback.value - reached >= _ENOUGH:
            reached, since = callback.value, now
        if now - since > policy.stall:
            end()
            raise TimeoutError(f"stalled: {callback.value - reached} bytes in {policy.stall:g} s")
        if now - started > policy.attempt:
            end()
            raise TimeoutError(f"too slow: {callback.value} bytes in {policy.attempt:g} s")


def _begin(
    fs: Any, inner: str, path: Path, callback: Any
) -> tuple[concurrent.futures.Future[None], Callable[[], object]]:
    """Start copying a file, with the bytes so far in ``callback``; its future, and what ends it early."""
    if fs.async_impl:
        coming = asyncio.run_coroutine_threadsafe(fs._get_file(inner, str(path), callback=callback), fs.loop)
        return coming, coming.cancel
    future: concurrent.futures.Future[None] = concurrent.futures.Future()
    ended = threading.Event()

    def copy() -> None:
        try:
            with fs.open(inner, "rb") as source, open(path, "wb") as target:
                # A read that hangs cannot be interrupted, but what it brings later is not written.
                while (chunk := source.read(_ENOUGH)) and not ended.is_set():
                    target.write(chunk)
                    callback.relative_update(len(chunk))
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    # A daemon, unlike the threads of a pool: the process can end while it hangs.
    threading.Thread(target=copy, name="transfer", daemon=True).start()
    return future, ended.set


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of aiohttp or botocore stands for."""
    for cause in (error, error.__cause__):
        status = getattr(cause, "status", None)
        response = getattr(cause, "response", None)
        if status is None and isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(status, int):
            return status
    return 404 if isinstance(error, FileNotFoundError) else None


def _may_pass(error: BaseException) -> bool:
    status = _status(error)
    if status is not None:
        return status >= 500 or status in _TRANSIENT_STATUS
    if isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError | FileExistsError):
        return False
    transient: list[type[BaseException]] = [OSError, TimeoutError, asyncio.TimeoutError]
    # Errors of libraries that are there only when they were the ones to raise.
    if aiohttp := sys.modules.get("aiohttp"):
        if isinstance(error, aiohttp.InvalidURL | aiohttp.ClientConnectorCertificateError):
            return False
        transient.append(aiohttp.ClientError)
    if botocore := sys.modules.get("botocore.exceptions"):
        transient += [botocore.HTTPClientError, botocore.ConnectionError]
    return isinstance(error, tuple(transient))


def _reason(error: BaseException) -> str:
    """One line: the status where there is one, what happened otherwise; never a URL with its query."""
    status = _status(error)
    if status is not None:
        from http import HTTPStatus

        phrase = HTTPStatus(status).phrase if status in {s.value for s in HTTPStatus} else ""
        code = getattr(error.__cause__, "response", None)
        detail = code.get("Error", {}).get("Code") if isinstance(code, dict) else None
        return " ".join(filter(None, (str(status), phrase, f"({detail})" if detail else "")))
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal sha256 of ``data``."""
    return hashlib.sha256(data).hexdigest()
