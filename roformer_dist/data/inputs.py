"""Which files the inputs name: local or any URL that fsspec opens, in an order no machine changes."""

from __future__ import annotations

import hashlib
import os
import posixpath
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal
from urllib.parse import unquote

from roformer_dist.data.errors import DataError
from roformer_dist.data.remote import download, is_url, without_secrets

Kind = Literal["text", "jsonl", "parquet"]
KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".parquet": "parquet",
}
_HASHED = 2**22  # bytes at a time
_MAGIC = "*?["


@dataclass(frozen=True)
class InputFile:
    """One file of documents.

    Attributes:
        name: relative to the input that it was found under, with ``/``.
        url: where it is: a local path, or a URL of fsspec.
        folder: the folder that it is in, from the name of the input's own folder on.
        size: bytes, 0 until it is measured where the server does not say.
    """

    name: str
    url: str
    folder: str
    size: int

    @property
    def suffix(self) -> str:
        """The ending that decides how it is read, such as ``.jsonl.gz``."""
        return next(suffix for suffix in KINDS if self.name.lower().endswith(suffix))

    @property
    def kind(self) -> Kind:
        """What it holds: one text, JSON lines, or a table."""
        return KINDS[self.suffix]

    @property
    def shown(self) -> str:
        """``url`` as it may be printed."""
        return without_secrets(self.url) if is_url(self.url) else self.url

    @contextmanager
    def local(self, sha256: str | None = None) -> Iterator[Path]:
        """It as a local file: itself, or a copy that is downloaded for as long as the block lasts.

        Args:
            sha256: what the copy must have.
        """
        if not is_url(self.url):
            yield Path(self.url)
            return
        with tempfile.TemporaryDirectory(prefix="roformer-dist-input-") as folder:
            path = Path(folder) / "input"
            with reading(self.shown):
                if not download(self.url, path, sha256=sha256):
                    raise InputChanged.of(self.shown)
            yield path

    def measured(self, progress: Callable[[int], None]) -> tuple[InputFile, str]:
        """It with the size that it has, and the hexadecimal sha256 of its bytes; ``progress`` is told how many."""
        with self.local() as path, reading(self.shown), open(path, "rb") as file:
            size, digest = 0, hashlib.sha256()
            while data := file.read(_HASHED):
                digest.update(data)
                size += len(data)
                progress(len(data))
            return replace(self, size=size), digest.hexdigest()


class InputChanged(DataError):
    """An input is not what it was when its hash was taken."""

    @classmethod
    def of(cls, where: str) -> InputChanged:
        """For the file ``where``."""
        return cls(f"{where}: changed while it was being read; start again when it is complete")


def find_inputs(inputs: Sequence[str], ignored: Counter[str] | None = None) -> list[InputFile]:
    """The files that ``inputs`` name, each once: files, folders (searched deeply) or globs.

    Inputs keep their order and the files of one input are sorted by name, so the result does not
    depend on the file system. Hidden files are files as any other. Nothing is left out unseen: what has
    another ending is counted by it in ``ignored``.

    Raises:
        DataError: an input names no file of a known kind, or what is found is no file that can be read: a
            link to nothing or to a folder, a pipe, a folder that a glob matches or that may not be listed.
    """
    found: dict[str, InputFile] = {}
    others: dict[str, str] = {}
    for text in inputs:
        if not text or text.endswith("://"):
            raise DataError(
                f"--input {text!r}: names nothing (a variable of the shell that is not set?); give a "
                f"{', '.join(KINDS)} file, a folder or a quoted glob"
            )
        shown = without_secrets(text) if is_url(text) else text
        with reading(shown, option="--input "):
            files, rest = _find(text)
        if not files:
            raise DataError(
                f"--input {shown}: no {', '.join(KINDS)} file found; give such a file, a folder or a quoted glob"
            )
        for file in sorted(files, key=lambda file: (file.name, file.url)):
            found.setdefault(file.url if is_url(file.url) else os.path.realpath(file.url), file)
        others |= {name: posixpath.splitext(name)[1].lower() or "no ending" for name in rest}
    if not found:
        raise DataError(f"no input was given; name at least one {', '.join(KINDS)} file, folder or glob")
    if ignored is not None:
        ignored.update(others.values())
    return list(found.values())


def measure_inputs(
    files: Sequence[InputFile], workers: int, progress: Callable[[int], None]
) -> tuple[list[InputFile], list[str]]:
    """The files with their sizes, and their sha256; ``progress`` is called here with bytes that were hashed."""
    done: SimpleQueue[int] = SimpleQueue()
    measured = []
    # Hashing and reading leave Python's lock, so threads are enough.
    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in [pool.submit(file.measured, done.put) for file in files]:
                while not wait([future], 1).done:
                    progress(_drained(done))
                measured.append(future.result())
                progress(_drained(done))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [file for file, _ in measured], [sha256 for _, sha256 in measured]


def _drained(done: SimpleQueue[int]) -> int:
    return sum(done.get() for _ in range(done.qsize()))


@contextmanager
def reading(where: str, *, option: str = "") -> Iterator[None]:
    """Turn what a file system raises into one line that names ``where``."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise DataError(f'{option}{where}: {reason}; pip install "roformer-dist[remote]"') from None
    except FileNotFoundError:
        raise DataError(f"{option}{where}: no such file or folder") from None
    except Exception as error:
        # Every remote protocol has errors of its own, not all of them OSErrors.
        if not is_url(where) and not isinstance(error, OSError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{option}{where}: cannot be read ({reason}){_remedy(reason)}") from None


def _remedy(reason: str) -> str:
    """What to do about an error whose own words do not say it."""
    if "credentials" in reason.lower():
        return "; for s3:// set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if reason.startswith("Protocol not known"):
        return "; give a path, or a URL that fsspec opens: file://, http://, https://, s3://"
    return ""


def is_http(text: str) -> bool:
    """Whether it is a URL of a web server, which says of no name whether it is a file or a folder."""
    return text.startswith(("http://", "https://"))


def _exists(system: Any, url: str) -> bool:
    """Whether a web server has it; fsspec's own ``isfile`` calls every failure an absence."""
    try:
        return bool(system.info(url))
    except FileNotFoundError as error:
        if error.__cause__ is None or getattr(error.__cause__, "status", None) == 404:
            raise
        raise OSError(error.__cause__) from None


def _find(text: str) -> tuple[list[InputFile], list[str]]:
    """The files that ``text`` names, and the paths of those with another ending."""
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    # Else fsspec would take a name such as data:1.txt for a URL of its own.
    system, path = (
        url_to_fs(text) if is_url(text) else (LocalFileSystem(), os.path.abspath(os.path.expanduser(text)))
    )
    # What a signed URL carries behind its path is no part of the name.
    signed = is_http(text) and "?" in text
    plain = path.partition("?")[0] if signed else path
    plainly = unquote if is_http(text) else str

    def make(base: str, found: str, size: Any) -> InputFile:
        name = plainly(posixpath.relpath(found.partition("?")[0] if signed else found, base))
        own = plainly(posixpath.basename(base.rstrip("/")))
        folder = posixpath.join(own, posixpath.dirname(name)).rstrip("/")
        return InputFile(
            name, system.unstrip_protocol(found) if is_url(text) else found, folder, int(size or 0)
        )

    known = tuple(KINDS)
    is_file = plain.lower().endswith(known) and (
        _exists(system, path) if is_http(text) else system.isfile(path)
    )
    if is_file:
        return [make(posixpath.dirname(plain), path, system.info(path).get("size"))], []
    base, matches = _matches(system, path, local=_is_local(text))
    named = {found: info for found, info in matches.items() if found.lower().endswith(known)}
    others = [found for found in matches if found not in named]
    return [make(base, found, info.get("size")) for found, info in named.items()], others


def _is_local(text: str) -> bool:
    return not is_url(text) or text.startswith(("file://", "local://"))


def _matches(system: Any, path: str, *, local: bool) -> tuple[str, dict[str, Any]]:
    """The folder that ``path`` names or that its glob begins in, and all files in question by their path."""
    if any(character in path for character in _MAGIC) and not system.exists(path):
        parts = path.split("/")
        fixed = next(i for i, part in enumerate(parts) if any(character in part for character in _MAGIC))
        found = system.glob(path, detail=True)
        # With ** at its end it matches the folders' files as well.
        folders = [name for name, info in found.items() if info.get("type") == "directory"]
        if folders and parts[-1] != "**":
            raise DataError(
                f"{folders[0]} is a folder that the glob matches; name the folder itself as an --input"
            )
        base = "/".join(parts[:fixed]) or "/"
    elif system.isdir(path):
        base, found = path, system.find(path, detail=True, **({"withdirs": True} if local else {}))
    else:
        base, found = path, {path: {"type": "other", "islink": os.path.islink(path)}} if local else {}
    if local:
        for name, info in found.items():
            _check_local(name, info)
    return base, {name: info for name, info in found.items() if info.get("type") != "directory"}


def _check_local(path: str, info: dict[str, Any]) -> None:
    """Raise ``DataError`` for what could hold text and would not be read; fsspec passes over it."""
    if info.get("islink") and not os.path.exists(path):
        raise DataError(f"{path} is a link to {os.readlink(path)}, which is not there; restore or remove it")
    if info.get("islink") and os.path.isdir(path):
        raise DataError(f"{path} is a link to a folder and not followed; give it as an --input of its own")
    if info["type"] == "directory":
        if not os.access(path, os.R_OK | os.X_OK):
            raise DataError(f"{path} is a folder that may not be listed; change its permissions")
    elif not os.path.exists(path):
        raise FileNotFoundError(path)
    elif not os.path.isfile(path):
        raise DataError(
            f"{path} is neither a file nor a folder (a pipe, a device?); remove it or write it to a file"
        )
