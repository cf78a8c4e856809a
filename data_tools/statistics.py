"""The closing figures of a build."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roformer_dist.data.shards import WrittenShards


def describe_shards(out: Path, written: WrittenShards, ignored: Counter[str]) -> dict[str, Any]:
    """What was read, left out and written, with the histogram of document lengths.

    Args:
        ignored: files that were found and not read, by their ending.
    """
    from data_tools.packing_report import octaves
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
        "ignored_files": dict(sorted(ignored.items())),
        "records": inputs["records"],
        "duplicates": inputs["duplicates"],
        "skipped": inputs["skipped"],
        "documents": manifest.documents,
        "text_bytes": inputs["text_bytes"],
        "tokens": manifest.tokens,
        # The EOS of each document stands for no text.
        "bytes_per_token": round(inputs["text_bytes"] / max(1, manifest.tokens - manifest.documents), 3),
        "document_lengths": octaves(lengths),
        **grouped,
        "shards": len(manifest.shards),
        "dtype": manifest.dtype,
        "root": manifest.root,
        "reused": written.reused,
        "resumed_shards": written.resumed,
    }
