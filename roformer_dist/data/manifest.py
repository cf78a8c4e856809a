"""The manifest of a shards folder, and the layout of the files beside each shard.

The folder's files are described in ``docs/data_format.md``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from roformer_dist.data.errors import DataError
from roformer_dist.data.files import parse_json, sha256_json

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
TOKENIZER_JSON = "tokenizer.json"
FORMAT, VERSION = "roformer_dist.shards", 2
INDEX_DTYPE = np.dtype(
    [("offset", "<u8"), ("bytes", "<u8"), ("tokens", "<u8"), ("crc32", "<u4"), ("group", "<u8")]
)
# Small, because a piece of a long document is read with the whole blocks that it begins and ends in.
BLOCK_BYTES = 8_192
BLOCKS_DTYPE = np.dtype("<u4")


@dataclass(frozen=True)
class Shard:
    """One shard as the manifest describes it."""

    name: str
    bytes: int
    sha256: str
    index_sha256: str
    blocks_sha256: str
    documents: int
    tokens: int

    @property
    def index_name(self) -> str:
        """The file name of its index, beside the tar."""
        return self.name.removesuffix(".tar") + ".idx.npy"

    @property
    def blocks_name(self) -> str:
        """The file name of its blocks' checksums, beside the tar."""
        return self.name.removesuffix(".tar") + ".blocks.npy"


@dataclass(frozen=True)
class Manifest:
    """What a shards folder holds; ``root`` is a hash of all of it, contents included."""

    dtype: str
    vocab_size: int
    eos_id: int
    pad_id: int
    mask_id: int
    tokenizer_sha256: str
    inputs: dict[str, Any]
    shard_bytes: int
    documents: int
    tokens: int
    shards: tuple[Shard, ...]

    @property
    def tokenizer(self) -> str:
        """The file name of the tokenizer's copy: of one of ours, or of an imported model's."""
        return str(self.inputs.get("tokenizer", TOKENIZER))

    @property
    def root(self) -> str:
        """sha256 of the canonical JSON of every other field of the file."""
        return sha256_json(self._fields())

    def _fields(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def to_dict(self) -> dict[str, Any]:
        """The content of ``manifest.json``."""
        return {**self._fields(), "root": self.root}

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and check ``folder/manifest.json``; raises ``DataError`` naming the file."""
        path = folder / MANIFEST
        if not path.is_file():
            raise DataError(
                f"{folder}: no {MANIFEST}, so not a shards folder; write one: roformer-dist data shards"
            )
        return cls.parse(path.read_bytes(), str(path))

    @classmethod
    def parse(cls, data: bytes, path: str) -> Manifest:
        """Check the content of a manifest; raises ``DataError`` naming ``path``, where it comes from."""
        fields = parse_json(data, path)
        root = fields.pop("root", None)
        if (fields.get("format"), fields.get("version")) != (FORMAT, VERSION):
            raise DataError(
                f"{path}: format {fields.get('format')!r} version {fields.get('version')!r}, this program "
                f"reads {FORMAT!r} version {VERSION}; write the shards again"
            )
        if sha256_json(fields) != root:
            raise DataError(f"{path}: its content does not match its root {root}; write the shards again")
        del fields["format"], fields["version"]
        try:
            found = cls(**{**fields, "shards": tuple(Shard(**shard) for shard in fields["shards"])})
            if found.tokenizer not in (TOKENIZER, TOKENIZER_JSON):
                raise TypeError(f"tokenizer {found.tokenizer!r}")
        except (AttributeError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: not the fields of a manifest ({error}); write the shards again"
            ) from None
        return found
