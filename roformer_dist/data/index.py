"""Where the documents of one shard are and what their blocks must hash to, checked against the manifest."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from roformer_dist.data.errors import DataError
from roformer_dist.data.manifest import BLOCK_BYTES, BLOCKS_DTYPE, INDEX_DTYPE, MANIFEST, Shard
from roformer_dist.data.sources import Source


@dataclass(frozen=True)
class ShardIndex:
    """The documents of a shard, numbered from 0 in it.

    Attributes:
        shard: as the manifest describes it.
        first: the number of its first document in the folder.
        records: ``INDEX_DTYPE`` ``[documents]``.
        offset, tokens: views of the records' fields, ``[documents]`` each.
        first_block: int64 ``[documents]``, where a document's blocks are in ``blocks``.
        blocks: uint32 ``[blocks]``, the crc32 of each block.
    """

    shard: Shard
    first: int
    records: np.ndarray
    offset: np.ndarray
    tokens: np.ndarray
    first_block: np.ndarray
    blocks: np.ndarray


def load_index(source: Source, shard: Shard, first: int, token_bytes: int) -> ShardIndex:
    """The index of a shard whose first document has the number ``first``.

    Raises:
        DataError: a file beside the shard is missing, damaged, or written for another shard.
    """
    records = _array(source, shard.index_name, shard.index_sha256, INDEX_DTYPE)
    blocks = _array(source, shard.blocks_name, shard.blocks_sha256, BLOCKS_DTYPE)
    counts = -(-records["bytes"].astype(np.int64) // BLOCK_BYTES)
    total = int(records["tokens"].sum())
    # What hashes cannot say: that the files were written for each other.
    found = (len(records), total, int(records["bytes"].sum()), int(counts.sum()))
    expected = (shard.documents, shard.tokens, shard.tokens * token_bytes, len(blocks))
    if found != expected:
        raise DataError(
            f"{source.where(shard.index_name)}: documents, tokens, bytes and blocks are {found}, {MANIFEST} and "
            f"{shard.blocks_name} have {expected}; write the shards again"
        )
    first_block = np.cumsum(counts) - counts
    return ShardIndex(shard, first, records, records["offset"], records["tokens"], first_block, blocks)


def _array(source: Source, name: str, sha256: str, dtype: np.dtype) -> np.ndarray:
    array = np.load(io.BytesIO(source.small(name, sha256)), allow_pickle=False)
    if array.dtype != dtype or array.ndim != 1:
        raise DataError(
            f"{source.where(name)}: {array.dtype} {array.shape} instead of {dtype} records; "
            "write the shards again"
        )
    return array
