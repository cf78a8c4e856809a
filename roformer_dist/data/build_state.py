"""What an unfinished build has on disk, so that a killed one goes on after its last finished shard.

Everything is in the hidden folder ``.NAME.partial`` beside the shards folder ``NAME``::

    recipe.json         what is being built, to refuse another build
    lock                held by the process that builds
    seen.sqlite         when duplicates are left out
    shard-000000.json   a finished shard and where the inputs stood after it
    shards/             becomes NAME when all is there
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from roformer_dist.data.errors import DataError
from roformer_dist.data.files import atomic_file, json_bytes, read_json, sha256_file, sync_folder
from roformer_dist.data.inputs import InputFile
from roformer_dist.data.manifest import Shard

_RECIPE, _SHARDS = "recipe.json", "shards"


@dataclass(frozen=True)
class Progress:
    """Where the inputs stand.

    Attributes:
        file, position: the next record: number of the input file, and of the record in it.
        records: how many were read, good and bad.
        text_bytes: of the documents kept, as UTF-8.
        duplicates: documents left out because an equal one came before.
        skipped: records left out because they hold no document, by reason.
        inputs: at the end of a shard, the hash of the input files that it depends on.
    """

    file: int = 0
    position: int = 0
    records: int = 0
    text_bytes: int = 0
    duplicates: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    inputs: str = ""

    def skip(self, reason: str) -> Progress:
        """After one more bad record."""
        return replace(self, skipped={**self.skipped, reason: self.skipped.get(reason, 0) + 1})

    def after(self, file: int, position: int) -> Progress:
        """After the record at ``position`` of ``file``."""
        return replace(self, file=file, position=position + 1, records=self.records + 1)


def running_hashes(files: Sequence[InputFile], hashes: Sequence[str]) -> list[str]:
    """Hexadecimal sha256 of the names and contents of the first 0, 1, … of ``files``, which have ``hashes``."""
    digest = hashlib.sha256()
    found = [digest.hexdigest()]
    for file, sha256 in zip(files, hashes):
        digest.update(json.dumps([file.name, file.folder, sha256]).encode())
        found.append(digest.hexdigest())
    return found


class PartialBuild:
    """The hidden folder of a build; a context that holds its lock.

    An unfinished build of other input files goes on from the shards that depend on none that changed.

    Args:
        hashes: the ``running_hashes`` of the input files.

    Raises:
        DataError: another process builds the same folder, or an unfinished build there has another recipe.
    """

    def __init__(self, out: Path, recipe: dict[str, Any], hashes: Sequence[str]) -> None:
        self._out, self._recipe, self._hashes = out, recipe, hashes
        self.path = out.with_name(f".{out.name}.partial")
        self.folder = self.path / _SHARDS
        self.shards: list[Shard] = []
        self.progress = Progress()
        self._lock = -1

    def __enter__(self) -> PartialBuild:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise DataError(f"{self._out}: another process is building it; wait for that one") from None
        try:
            self._load()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # A build that has nothing to go on from leaves nothing.
        if not self.shards:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def _load(self) -> None:
        found = read_json(self.path / _RECIPE) if (self.path / _RECIPE).is_file() else None
        other_files = False
        if found is not None and found != self._recipe:
            other_files = _without_files(found) == _without_files(self._recipe)
        if found is not None and not other_files:
            check_recipe(self.path, "an unfinished build", found, self._recipe)
        while (record := self._record(len(self.shards))).is_file():
            content = read_json(record)
            shard, progress = Shard(**content["shard"]), Progress(**content["progress"])
            same = progress.inputs in self._hashes[progress.file + 1 : progress.file + 2]
            if not self._is_whole(shard) or (other_files and not same):
                break
            self.shards.append(shard)
            self.progress = progress
        if other_files and not self.shards:
            raise DataError(
                f"{self.path}: an unfinished build of other input files, and no finished shard of it comes before the "
                "first that changed; delete it to start again, or choose another --out"
            )
        # What was written after the last finished shard is not trusted.
        trusted = {name for s in self.shards for name in (s.name, s.index_name, s.blocks_name)}
        for number, record in self._records():
            if number >= len(self.shards):
                record.unlink()
        # After what belongs to the old one is gone.
        if found != self._recipe:
            with atomic_file(self.path / _RECIPE) as file:
                file.write(json_bytes(self._recipe))
        for path in self.folder.iterdir():
            if path.name not in trusted:
                path.unlink()

    def _record(self, number: int) -> Path:
        return self.path / f"shard-{number:06d}.json"

    def _records(self) -> list[tuple[int, Path]]:
        return [(int(path.stem.split("-")[1]), path) for path in self.path.glob("shard-*.json")]

    def _is_whole(self, shard: Shard) -> bool:
        hashes = {
            shard.name: shard.sha256,
            shard.index_name: shard.index_sha256,
            shard.blocks_name: shard.blocks_sha256,
        }
        paths = {self.folder / name: sha256 for name, sha256 in hashes.items()}
        return all(path.is_file() and sha256_file(path) == sha256 for path, sha256 in paths.items())

    def finish_shard(self, shard: Shard, progress: Progress) -> None:
        """Note a shard whose files are on disk, and where the inputs stand after it."""
        sync_folder(self.folder)
        with atomic_file(self._record(len(self.shards))) as file:
            file.write(json_bytes({"shard": asdict(shard), "progress": asdict(progress)}))
        self.shards.append(shard)
        self.progress = progress

    def discard(self) -> None:
        """Forget all shards, because their inputs changed while they were written."""
        self.shards.clear()

    def publish(self) -> None:
        """Make the shards folder appear under its name."""
        sync_folder(self.folder)
        os.rename(self.folder, self._out)
        sync_folder(self._out.parent)
        self.shards.clear()


def _without_files(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what says which files are read."""
    inputs = recipe.get("inputs", {})
    return {**recipe, "inputs": {n: v for n, v in inputs.items() if n not in ("files", "bytes", "sha256")}}


def check_recipe(folder: Path, what: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ``DataError`` with the first difference between two recipes."""
    for name in sorted({*found, *wanted}):
        mine, theirs = wanted.get(name), found.get(name)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            check_recipe(folder, what, theirs, mine)
        elif mine != theirs:
            raise DataError(
                f"{folder}: {what} has {name} {theirs}, but this run has {mine}; "
                "choose another --out or delete it"
            )
