"""Writing text documents as token shards: webdataset tars, an index for each, a manifest."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.writer import TarWriter

from roformer_dist.data.errors import DataError
from roformer_dist.data.files import TextFile, atomic_folder, json_bytes, sha256_file
from roformer_dist.data.manifest import (
    BLOCK_BYTES,
    BLOCKS_DTYPE,
    INDEX_DTYPE,
    MANIFEST,
    TOKENIZER,
    Manifest,
    Shard,
)
from roformer_dist.data.tokenizer import Tokenizer
from roformer_dist.data.verify import verify_shards

_BLOCK = 512  # tar pads every member to whole blocks
Progress = Callable[[int], None]


def _no_progress(documents: int) -> None:
    del documents


@dataclass(frozen=True)
class WrittenShards:
    """The result of ``write_shards``: the manifest, and whether a finished folder was reused."""

    manifest: Manifest
    reused: bool


def write_shards(
    files: Sequence[TextFile],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    shard_bytes: int = 256 * 2**20,
    progress: Progress = _no_progress,
) -> WrittenShards:
    """Tokenize ``files`` and write them, in order, as the shards folder ``out``.

    Each document gets the EOS id at its end and nothing at its start. A shard is closed once it holds
    ``shard_bytes`` of tokens; documents are never split. The same inputs give the same bytes. A
    finished folder made from the same inputs is verified and reused.

    Args:
        progress: called with the number of documents done since its last call.

    Raises:
        DataError: ``out`` holds something else, or a finished folder of other inputs or a damaged one.
    """
    if shard_bytes < 1:
        raise DataError(f"--shard-mb gives {shard_bytes} bytes for a shard; give a positive number")
    folder = Path(out)
    recipe = {
        "tokenizer_sha256": tokenizer.sha256,
        "inputs": _describe_inputs(files),
        "shard_bytes": shard_bytes,
    }
    if (folder / MANIFEST).is_file():
        return WrittenShards(_reuse(folder, recipe), reused=True)
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    with atomic_folder(folder) as partial:
        shards: list[Shard] = []
        writer = _ShardWriter(partial, 0)
        for number, file in enumerate(files):
            if writer.token_bytes >= shard_bytes:
                shards.append(writer.close())
                writer = _ShardWriter(partial, len(shards))
            ids = np.append(tokenizer.encode(file.read()), tokenizer.eos_id)
            writer.add(f"{number:012d}", ids.astype(np.dtype(dtype).newbyteorder("<")), {"source": file.name})
            progress(1)
        shards.append(writer.close())
        shutil.copyfile(tokenizer.path, partial / TOKENIZER)
        manifest = Manifest(
            dtype=dtype,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            mask_id=tokenizer.mask_id,
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            shards=tuple(shards),
            **recipe,
        )
        (partial / MANIFEST).write_bytes(json_bytes(manifest.to_dict()))
    return WrittenShards(manifest, reused=False)


def group_hash(key: str) -> int:
    """The ``group`` of an index record: the first 8 bytes of sha256 of ``key`` in UTF-8, as little-endian."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")


def _describe_inputs(files: Sequence[TextFile]) -> dict[str, Any]:
    """Names and contents of the inputs as counts and one sha256, so that a rerun can compare."""
    digest, total = hashlib.sha256(), 0
    for file in files:
        total += file.path.stat().st_size
        digest.update(json.dumps(file.fingerprint).encode())
    return {"documents": len(files), "bytes": total, "sha256": digest.hexdigest()}


def _reuse(folder: Path, recipe: dict[str, Any]) -> Manifest:
    manifest = Manifest.load(folder)
    for name, value in recipe.items():
        found = getattr(manifest, name)
        if found != value:
            raise DataError(
                f"{folder}: finished before with {name} {_show(found)}, but this run has {_show(value)}; "
                "choose another --out or delete it"
            )
    for _, problem in verify_shards(folder):
        if problem:
            raise DataError(f"{problem}; delete {folder} and write the shards again")
    return manifest


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={_show(item)}" for name, item in sorted(value.items()))
    return str(value)


class _ShardWriter:
    """Writes one tar and its index into a folder that is published as a whole."""

    def __init__(self, folder: Path, number: int) -> None:
        self._path = folder / f"shard-{number:06d}.tar"
        self._file = open(self._path, "wb")  # noqa: SIM115
        # A fixed mtime makes the same documents the same bytes.
        self._tar = TarWriter(self._file, encoder=False, mtime=0)
        self._records: list[tuple[int, int, int, int, int]] = []
        self._blocks: list[int] = []
        self.token_bytes = 0

    def add(self, key: str, tokens: np.ndarray, meta: dict[str, str], group: int = 0) -> None:
        data = tokens.tobytes()
        text = json.dumps(meta, sort_keys=True).encode()
        self._tar.write({"__key__": key, "json": text, "tokens.bin": data})
        # Members are written in the order of their names, so the tokens are what was written last.
        padded = -(-len(data) // _BLOCK) * _BLOCK
        offset = self._tar.tarstream.offset - padded
        self._records.append((offset, len(data), len(tokens), zlib.crc32(data), group))
        self._blocks += [
            zlib.crc32(data[start : start + BLOCK_BYTES]) for start in range(0, len(data), BLOCK_BYTES)
        ]
        self.token_bytes += len(data)

    def close(self) -> Shard:
        self._tar.close()
        self._file.close()
        index = np.array(self._records, dtype=INDEX_DTYPE)
        name = self._path.name
        stem = name.removesuffix(".tar")
        return Shard(
            name=name,
            bytes=self._path.stat().st_size,
            sha256=sha256_file(self._path),
            index_sha256=self._save(f"{stem}.idx.npy", index),
            blocks_sha256=self._save(f"{stem}.blocks.npy", np.array(self._blocks, dtype=BLOCKS_DTYPE)),
            documents=len(index),
            tokens=int(index["tokens"].sum()),
        )

    def _save(self, name: str, array: np.ndarray) -> str:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        (self._path.parent / name).write_bytes(buffer.getvalue())
        return hashlib.sha256(buffer.getvalue()).hexdigest()
