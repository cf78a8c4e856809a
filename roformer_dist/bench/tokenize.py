"""``bench tokenize``: from text to token ids, ours beside sentencepiece itself, tokenizers and datatrove."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from roformer_dist.bench.harness import Contender, Group, Metric, Sample

# Workload -> its contenders, ours first.
CONTENDERS = {
    "documents": ("ours", "sentencepiece", "tokenizers"),
    "long": ("ours", "sentencepiece", "tokenizers"),
    "shards": ("ours", "datatrove"),
}
# A converted tokenizer may differ where text looks like a control piece; more than this is other work.
TOKEN_TOLERANCE = 0.001
CORPUS, LONG, MODEL = "corpus.jsonl", "long.jsonl", "tokenizer.model"
_TRAINED_ON = 8 * 2**20  # characters


@dataclass(frozen=True)
class TokenizeJob:
    """What one sample does; the child process gets it as JSON.

    Attributes:
        folder: has the corpus and the tokenizer.
        processes: that encode at the same time, each with an encoder of its own.
    """

    contender: str
    workload: str
    folder: str
    processes: int

    def to_json(self) -> str:
        """For ``from_json`` in another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TokenizeJob:
        """The job that ``to_json`` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class TokenizeSettings:
    """What the user chose.

    Attributes:
        max_mb, long_mb: text of the corpus that is used, and of the one long document; MB are 10^6 bytes.
        tokenizer: a model file, or None: one of ``vocab_size`` is trained on the corpus.
    """

    inputs: tuple[str, ...]
    workloads: tuple[str, ...] = tuple(CONTENDERS)
    tokenizer: Path | None = None
    vocab_size: int = 8192
    processes: int = 2
    max_mb: float = 16.0
    long_mb: float = 4.0

    def __post_init__(self) -> None:
        unknown = [name for name in self.workloads if name not in CONTENDERS]
        if unknown or not self.workloads:
            raise ValueError(f"--workloads {','.join(unknown)!r}: choose from {', '.join(CONTENDERS)}")


METRICS = (
    Metric("mb_per_second", "MB/s", lambda s: _rate(s, "seconds"), lambda value: f"{value:.2f}"),
    Metric("mb_per_cpu_second", "MB/CPU s", lambda s: _rate(s, "cpu_seconds"), lambda value: f"{value:.2f}"),
)
NOTES = (Metric("tokens", "tokens", lambda s: s.reported["tokens"], lambda value: f"{value:,.0f}"),)


def prepare(settings: TokenizeSettings, folder: Path) -> dict[str, int]:
    """Write the corpus, the long document and the tokenizer into ``folder``; returns what there is of them.

    Raises:
        ValueError: the inputs or the tokenizer cannot be read.
    """
    from roformer_dist.data.documents import TextOptions, read_texts
    from roformer_dist.data.inputs import find_inputs
    from roformer_dist.data.tokenizer import Tokenizer, train_tokenizer

    texts: list[str] = []
    size = 0
    for text in read_texts(find_inputs(settings.inputs), TextOptions()):
        texts.append(text)
        size += len(text.encode())
        if size >= settings.max_mb * 1e6:
            break
    long = "\n".join(texts).encode()[: int(settings.long_mb * 1e6)].decode(errors="ignore")
    _write_lines(folder / CORPUS, texts)
    _write_lines(folder / LONG, [long])
    if settings.tokenizer is not None:
        model = Tokenizer(settings.tokenizer).path.read_bytes()
    else:
        model = train_tokenizer(_first(texts, _TRAINED_ON), settings.vocab_size)
    (folder / MODEL).write_bytes(model)
    return {"documents": len(texts), "bytes": size, "long_bytes": len(long.encode())}


def tokenize_groups(settings: TokenizeSettings, folder: Path, facts: dict[str, int]) -> list[Group]:
    """One group for each workload, on what ``prepare`` wrote."""
    megabytes, processes = facts["bytes"] / 1e6, settings.processes
    titles = {
        "documents": f"{facts['documents']:,} documents, {megabytes:.1f} MB; {processes} independent encoders",
        "long": f"one document of {facts['long_bytes'] / 1e6:.1f} MB; one encoder",
        "shards": f"from {megabytes:.1f} MB of JSON lines to files of tokens; {processes} workers",
    }
    return [
        Group(
            titles[workload],
            {"workload": workload, **facts},
            [
                _contender(TokenizeJob(name, workload, str(folder), 1 if workload == "long" else processes))
                for name in CONTENDERS[workload]
            ],
            check=same_tokens,
        )
        for workload in settings.workloads
    ]


def same_tokens(ours: Sample, peer: Sample) -> str | None:
    """Why a peer's sample cannot stand beside ours, or None."""
    mine, theirs = ours.reported["tokens"], peer.reported["tokens"]
    if abs(theirs / mine - 1) <= TOKEN_TOLERANCE:
        return None
    return f"{theirs:,} tokens against our {mine:,}: not the same tokenizer"


def _contender(job: TokenizeJob) -> Contender:
    name = job.contender
    packages = {"ours": (), "datatrove": ("datatrove", "tokenizers")}.get(name, (name,))
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    install = {"datatrove": '"datatrove[processing]"'}.get(name, name)
    return Contender(
        name,
        "ours" if name == "ours" else "peer",
        (sys.executable, "-m", "roformer_dist.bench.tokenize_child", job.to_json()),
        f"{name}: not installed; pip install {install}" if absent else None,
        reports=True,
    )


def _rate(sample: Sample, seconds: str) -> float:
    return sample.reported["bytes"] / 1e6 / sample.reported[seconds]


def _write_lines(path: Path, texts: Sequence[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def _first(texts: Sequence[str], characters: int) -> list[str]:
    taken: list[str] = []
    for text in texts:
        taken.append(text[:characters])
        characters -= len(taken[-1])
        if characters <= 0:
            break
    return taken
