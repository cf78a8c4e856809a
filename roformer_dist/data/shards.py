"""Writing text documents as token shards: webdataset tars, an index for each, a manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from roformer_dist.data.build_state import PartialBuild, Progress, check_recipe, running_hashes
from roformer_dist.data.deduplication import SeenDocuments
from roformer_dist.data.documents import STOP, BadDocument, TextOptions, located
from roformer_dist.data.errors import DataError
from roformer_dist.data.files import atomic_file, check_folder_out, json_bytes, writing
from roformer_dist.data.inputs import InputChanged, InputFile, measure_inputs
from roformer_dist.data.json_tokenizer import AnyTokenizer, JsonTokenizer
from roformer_dist.data.manifest import MANIFEST, TOKENIZER_JSON, VERSION, Manifest
from roformer_dist.data.records import Record, read_records
from roformer_dist.data.shard_writer import ShardWriter, group_hash
from roformer_dist.data.verify import verify_shards
from roformer_dist.data.workers import Bad, Encoded, Encoder, encode_batches

# What travels to a worker at once. Neither number changes what is written.
_BATCH_BYTES, _BATCH_RECORDS = 2**20, 1024
_PLACE = {"jsonl": ("line", 1), "parquet": ("row", 0)}
# Called with what is being done and the bytes of the inputs done since its last call.
Report = Callable[[str, int], None]


def _no_report(stage: str, size: int) -> None:
    del stage, size


@dataclass(frozen=True)
class WrittenShards:
    """The result of ``write_shards``.

    Attributes:
        reused: whether a finished folder was verified and kept.
        resumed: how many finished shards of a killed build were verified and kept.
    """

    manifest: Manifest
    reused: bool = False
    resumed: int = 0


def write_shards(
    files: Sequence[InputFile],
    tokenizer: AnyTokenizer,
    out: str | Path,
    *,
    shard_bytes: int = 256 * 2**20,
    options: TextOptions = TextOptions(),  # noqa: B008
    deduplicate: bool = False,
    workers: int = 1,
    report: Report = _no_report,
) -> WrittenShards:
    """Tokenize the documents of ``files`` and write them, in order, as the shards folder ``out``.

    Each document gets the EOS id at its end and nothing at its start. A shard is closed once it holds
    ``shard_bytes`` of tokens; documents are never split. The same inputs give the same bytes, for any
    number of workers and after any number of kills: a build that was stopped goes on after its last
    finished shard, and a finished folder is verified and reused.

    Args:
        deduplicate: leave out a document whose text is equal to that of one before it.
        workers: processes that encode; 1 is this process itself.

    Raises:
        DataError: an input cannot be read or holds a bad document; ``out`` holds something else, or a
            finished folder of other inputs or a damaged one; a worker failed.
    """
    if shard_bytes < 1:
        raise DataError(f"--shard-mb gives {shard_bytes} bytes for a shard; give a positive number")
    if workers < 1:
        raise DataError(f"--workers {workers}: give at least 1")
    options.check(files)
    assert tokenizer.eos_id >= 0  # or it says why there is none, before anything is read
    folder = Path(out)
    finished = (folder / MANIFEST).is_file()
    if not finished:
        check_folder_out(folder)
    files, hashes = measure_inputs(files, workers, lambda size: report("Hashing", size))
    running = running_hashes(files, hashes)
    recipe = {
        "version": VERSION,
        "tokenizer_sha256": tokenizer.sha256,
        "shard_bytes": shard_bytes,
        "inputs": _describe_inputs(files, options, deduplicate) | {"sha256": running[-1]},
    }
    if isinstance(tokenizer, JsonTokenizer):
        recipe["inputs"] |= {"tokenizer": TOKENIZER_JSON, "tokenizer_settings": tokenizer.settings}
    if finished:
        return WrittenShards(_reuse(folder, recipe, options), reused=True)
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    encoder = Encoder(tokenizer.path, tokenizer.fingerprint, dtype, options)
    goes_on = "; the same command then goes on after the last finished shard"
    with writing(folder, goes_on), PartialBuild(folder, recipe, running) as partial:
        resumed = len(partial.shards)
        _refuse_skipped(partial.path, partial.progress.skipped, options)
        itemsize = 2 if dtype == "uint16" else 4
        build = _Build(partial, files, running, options, shard_bytes, deduplicate, itemsize)
        try:
            batches = _batches(files, hashes, options, partial.progress, report)
            build.run(encode_batches(encoder, batches, workers))
        except InputChanged:
            partial.discard()
            raise
        finally:
            build.close()
        manifest = _manifest(tokenizer, dtype, recipe, partial)
        _publish(tokenizer, manifest, partial)
    return WrittenShards(manifest, resumed=resumed)


def _describe_inputs(files: Sequence[InputFile], options: TextOptions, deduplicate: bool) -> dict[str, Any]:
    """What about the inputs decides what is written, beside their content, so that a rerun can compare."""
    return {
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "text_column": options.text_column,
        "group_by": options.group_by,
        "encoding": options.encoding,
        "errors": options.errors,
        "deduplicate": deduplicate,
    }


def _batches(
    files: Sequence[InputFile],
    hashes: Sequence[str],
    options: TextOptions,
    start: Progress,
    report: Report,
) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    report("Tokenizing", sum(file.size for file in files[: start.file]))
    for number in range(start.file, len(files)):
        records = read_records(
            number,
            files[number],
            text_column=options.text_column,
            group_by=options.group_by,
            sha256=hashes[number],
            first=start.position if number == start.file else 0,
            progress=lambda done: report("Tokenizing", done),
        )
        for record in records:
            batch.append(record)
            size += len(record.data or b"")
            if size >= _BATCH_BYTES or len(batch) >= _BATCH_RECORDS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


class _Build:
    """Takes results in the order of the inputs and writes shards; all decisions are made here, in order."""

    def __init__(
        self,
        partial: PartialBuild,
        files: Sequence[InputFile],
        hashes: Sequence[str],
        options: TextOptions,
        shard_bytes: int,
        deduplicate: bool,
        itemsize: int,
    ) -> None:
        self._partial, self._files, self._hashes, self._options = partial, files, hashes, options
        self._shard_bytes, self._itemsize = shard_bytes, itemsize
        self._progress = partial.progress
        self._documents = sum(shard.documents for shard in partial.shards)
        self._writer: ShardWriter | None = None
        self._seen: SeenDocuments | None = None
        if deduplicate:
            self._seen = SeenDocuments(
                partial.path / "seen.sqlite", shards=len(partial.shards), documents=self._documents
            )

    def run(self, results: Iterator[list[Encoded | Bad]]) -> None:
        """Write all shards; raises ``DataError`` for a bad document, or when there is no document."""
        for batch in results:
            for result in batch:
                self._add(result)
        if self._writer is not None:
            self._finish_shard(self._writer)
        if not self._documents:
            counts = ", ".join(f"{count} {reason}" for reason, count in self._progress.skipped.items())
            raise DataError(
                f"the inputs hold no document to write ({counts or 'no line or row'}); give others"
            )
        # Bad records and duplicates after the last shard count too.
        self._partial.progress = self._progress

    def close(self) -> None:
        """Let go of the files."""
        if self._writer is not None:
            self._writer.abandon()
        if self._seen is not None:
            self._seen.close()

    def _add(self, result: Encoded | Bad) -> None:
        record = result.record if isinstance(result, Bad) else result
        self._progress = self._progress.after(record.file, record.position)
        if isinstance(result, Bad):
            if self._options.on_bad == STOP:
                problem = BadDocument(result.reason, result.message)
                raise DataError(located(self._files[result.record.file], result.record, problem))
            self._progress = self._progress.skip(result.reason)
            return
        if self._seen is not None and not self._seen.add(result.sha256, len(self._partial.shards)):
            self._progress = replace(self._progress, duplicates=self._progress.duplicates + 1)
            return
        if self._writer is None:
            self._writer = ShardWriter(self._partial.folder, len(self._partial.shards), self._itemsize)
        self._writer.add(f"{self._documents:012d}", result.data, self._meta(result), group_hash(result.group))
        self._documents += 1
        self._progress = replace(self._progress, text_bytes=self._progress.text_bytes + result.text_bytes)
        if self._writer.token_bytes >= self._shard_bytes:
            self._finish_shard(self._writer)

    def _meta(self, result: Encoded) -> dict[str, Any]:
        file = self._files[result.file]
        meta: dict[str, Any] = {"source": file.name}
        if file.kind in _PLACE:
            name, first = _PLACE[file.kind]
            meta[name] = result.position + first
        if result.group is not None:
            meta["group"] = result.group
        return meta

    def _finish_shard(self, writer: ShardWriter) -> None:
        full = writer.token_bytes >= self._shard_bytes
        shard = writer.close()
        self._writer = None
        if self._seen is not None:
            self._seen.commit()
        # Where a shard is closed by the end of the inputs, it depends on there being no more.
        inputs = self._hashes[self._progress.file + 1] if full else f"all {self._hashes[-1]}"
        self._partial.finish_shard(shard, replace(self._progress, inputs=inputs))


def _manifest(tokenizer: AnyTokenizer, dtype: str, recipe: dict[str, Any], partial: PartialBuild) -> Manifest:
    progress = partial.progress
    counted = {
        "records": progress.records,
        "text_bytes": progress.text_bytes,
        "duplicates": progress.duplicates,
        "skipped": progress.skipped,
    }
    return Manifest(
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        mask_id=tokenizer.mask_id,
        tokenizer_sha256=tokenizer.sha256,
        inputs={**recipe["inputs"], **counted},
        shard_bytes=recipe["shard_bytes"],
        documents=sum(shard.documents for shard in partial.shards),
        tokens=sum(shard.tokens for shard in partial.shards),
        shards=tuple(partial.shards),
    )


def _publish(tokenizer: AnyTokenizer, manifest: Manifest, partial: PartialBuild) -> None:
    content = {manifest.tokenizer: tokenizer.path.read_bytes(), MANIFEST: json_bytes(manifest.to_dict())}
    for name, data in content.items():
        with atomic_file(partial.folder / name) as file:  # on disk before the folder appears
            file.write(data)
    partial.publish()


def _reuse(folder: Path, recipe: dict[str, Any], options: TextOptions) -> Manifest:
    manifest = Manifest.load(folder)
    found = {
        "version": VERSION,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "shard_bytes": manifest.shard_bytes,
        "inputs": {name: manifest.inputs.get(name) for name in recipe["inputs"]},
    }
    check_recipe(folder, "what was finished before", found, recipe)
    _refuse_skipped(folder, manifest.inputs["skipped"], options)
    for _, problem in verify_shards(folder):
        if problem:
            raise DataError(f"{problem}; delete {folder} and write the shards again")
    return manifest


def _refuse_skipped(folder: Path, skipped: dict[str, int], options: TextOptions) -> None:
    # Stopping at bad documents and skipping them differ only where there are any.
    if skipped and options.on_bad == STOP:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise DataError(
            f"{folder}: bad documents were skipped before ({counts}), but this run stops at them; give "
            "--on-bad-document skip, choose another --out or delete it"
        )
