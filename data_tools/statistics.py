"""The closing figures of a build."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from roformer_dist.data.shards import WrittenShards


def describe_shards(out: Path, written: WrittenShards) -> dict[str, Any]:
    """What was read, left out and written, with the histogram of document lengths."""
    from roformer_dist.data.store import ShardStore

    manifest = written.manifest
    inputs = manifest.inputs
    with ShardStore(out) as store:
        lengths, groups = store.lengths, store.groups
    grouped = {}
    if inputs["group_by"] is not None:
        named = groups[groups != 0]
        grouped = {"groups": len(set(named.tolist())), "documents_without_group": len(groups) - len(named)}
    return {
        "out": str(out),
        "files": inputs["files"],
        "records": inputs["records"],
        "duplicates": inputs["duplicates"],
        "skipped": inputs["skipped"],
        "documents": manifest.documents,
        "text_bytes": inputs["text_bytes"],
        "tokens": manifest.tokens,
        # The EOS of each document stands for no text.
        "bytes_per_token": round(inputs["text_bytes"] / max(1, manifest.tokens - manifest.documents), 3),
        "document_tokens": length_histogram(lengths),
        **grouped,
        "shards": len(manifest.shards),
        "dtype": manifest.dtype,
        "root": manifest.root,
        "reused": written.reused,
        "resumed_shards": written.resumed,
    }


def length_histogram(lengths: np.ndarray) -> dict[str, int]:
    """How many documents have up to 16 tokens, up to 32, and so on by powers of two, shortest to longest."""
    import numpy as np

    if not len(lengths):
        return {}
    powers = np.ceil(np.log2(np.maximum(lengths, 16))).astype(int)
    counts = np.bincount(powers)
    return {f"to {2**power}": int(counts[power]) for power in range(powers.min(), len(counts))}
