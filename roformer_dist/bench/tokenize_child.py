"""One sample of ``bench tokenize``: encode, and print the figures as a line of JSON."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from roformer_dist.bench.tokenize import CORPUS, LONG, MODEL, TokenizeJob

# A text to its number of tokens.
Count = Callable[[str], int]
_WARM_UP = 50_000  # characters


def main(job: TokenizeJob) -> None:
    """Run the job in this process, which must be fresh: its children's CPU time is counted."""
    figures = _write_shards(job) if job.workload == "shards" else _encode(job)
    print(json.dumps(figures))


def _encode(job: TokenizeJob) -> dict[str, Any]:
    texts = _texts(Path(job.folder) / (LONG if job.workload == "long" else CORPUS))
    # Dealt by size, the largest first, so that all have about the same to do.
    shares: list[list[str]] = [[] for _ in range(job.processes)]
    loads = [0] * job.processes
    for text in sorted(texts, key=len, reverse=True):
        least = loads.index(min(loads))
        shares[least].append(text)
        loads[least] += len(text)
    results = _together(
        job.processes, lambda number: _encoder(job), lambda count, n: sum(map(count, shares[n]))
    )
    return {
        "bytes": sum(len(text.encode()) for text in texts),
        "seconds": max(end for _, end, _, _ in results) - min(start for start, _, _, _ in results),
        "cpu_seconds": sum(cpu for _, _, cpu, _ in results),
        "tokens": sum(tokens for _, _, _, tokens in results),
    }


def _together(
    processes: int, load: Callable[[int], Any], work: Callable[[Any, int], int]
) -> list[tuple[float, float, float, int]]:
    """Load and warm up in each process, then start all at once: ``(start, end, CPU seconds, result)`` of each."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(processes), context.SimpleQueue()

    def run(number: int) -> None:
        loaded = load(number)
        barrier.wait()
        start, cpu = time.monotonic(), time.process_time()
        result = work(loaded, number)
        results.put((start, time.monotonic(), time.process_time() - cpu, result))

    running: list[Any] = [context.Process(target=run, args=(number,)) for number in range(processes)]
    for process in running:
        process.start()
    for process in running:
        process.join()
        if process.exitcode:
            # The others may wait for it at the barrier.
            for other in running:
                other.kill()
            sys.exit("an encoder failed; its error stands above")
    return [results.get() for _ in running]


def _encoder(job: TokenizeJob) -> Count:
    model = Path(job.folder) / MODEL
    if job.contender == "ours":
        from roformer_dist.data.tokenizer import Tokenizer

        tokenizer = Tokenizer(model)

        def count(text: str) -> int:
            return len(tokenizer.encode(text))

    elif job.contender == "sentencepiece":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))

        def count(text: str) -> int:
            return len(processor.encode(text))

    else:
        converted = convert(model)

        def count(text: str) -> int:
            return len(converted.encode(text, add_special_tokens=False).ids)

    count(" warm up\n" * (_WARM_UP // 9))
    return count


def _write_shards(job: TokenizeJob) -> dict[str, Any]:
    corpus, model = Path(job.folder) / CORPUS, Path(job.folder) / MODEL
    size = sum(len(text.encode()) for text in _texts(corpus))
    with tempfile.TemporaryDirectory() as folder:
        before, start = _cpu_seconds(), time.monotonic()
        if job.contender == "ours":
            from roformer_dist.data.inputs import find_inputs
            from roformer_dist.data.shards import write_shards
            from roformer_dist.data.tokenizer import Tokenizer

            files = find_inputs([str(corpus)])
            written = write_shards(files, Tokenizer(model), Path(folder) / "out", workers=job.processes)
            tokens = written.manifest.tokens
        else:
            tokens = _datatrove(corpus, model, Path(folder), job.processes)
        return {
            "bytes": size,
            "seconds": time.monotonic() - start,
            "cpu_seconds": _cpu_seconds() - before,
            "tokens": tokens,
        }


def _datatrove(corpus: Path, model: Path, out: Path, processes: int) -> int:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from datatrove.data import Document  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.tokens import DocumentTokenizer  # pyright: ignore[reportMissingImports]

    convert(model).save(str(out / "tokenizer.json"))

    def load(number: int) -> Any:
        return DocumentTokenizer(
            str(out),
            str(out / "tokenizer.json"),
            eos_token="</s>",
            # Ours keeps the order, so neither shuffles; a batch as large as ours holds.
            shuffle_documents=False,
            batch_size=100,
        )

    def work(step: Any, number: int) -> int:
        lines = open(corpus, encoding="utf-8").readlines()[number::processes]  # noqa: SIM115
        documents = (Document(text=json.loads(line)["text"], id=str(i)) for i, line in enumerate(lines))
        for _ in step.run(documents, number, processes) or ():
            pass
        return step.stats["tokens"].total

    return int(sum(tokens for *_, tokens in _together(processes, load, work)))


def convert(model: Path) -> Any:
    """The same byte-pair tokenizer for Hugging Face's tokenizers: pieces, merges by score, byte fallback.

    ``docs/data_format.md`` gives the normalizer.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, models, normalizers

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i, piece in enumerate(pieces):
        if processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i):
            continue
        parts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        parts = [(left, right) for left, right in parts if left in vocab and right in vocab]
        # Of several ways to a piece, the one whose halves were learned first.
        parts.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(-processor.get_score(i), pair) for pair in parts]
    merges.sort(key=lambda entry: entry[0])
    tokenizer = Tokenizer(
        models.BPE(vocab, [pair for _, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    escapes = (("\x1a", "\x1a0"), ("\u2581", "\x1a1"), ("\u2585", "\x1a2"), (" ", "\u2581"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(*pair) for pair in escapes])
    tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    tokenizer.add_special_tokens([AddedToken("</s>", normalized=False, special=True)])
    return tokenizer


def _texts(path: Path) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def _cpu_seconds() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


if __name__ == "__main__":
    main(TokenizeJob.from_json(sys.argv[1]))
