"""``bench train``: forward and backward of one step, ours beside Hugging Face. Nothing here imports torch."""

from __future__ import annotations

import importlib.util
import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from roformer_dist.bench.harness import Contender, Group, Metric, Sample, check_choice

WORKLOADS = {
    "masked": "masked LM, post-norm encoder",
    "causal": "causal LM, one document a row",
    "packed": "causal LM, packed documents",
}
# Peer family -> workload -> contenders. A packed row can be given to Llama in two ways: with a dense mask,
# or one call a document.
PEERS = {
    "hf-roformer": {"masked": ("hf-roformer",)},
    "hf-llama": {
        "causal": ("hf-llama",),
        "packed": ("hf-llama dense mask", "hf-llama by document"),
    },
}
NOT_INSTALLED = 'transformers: not installed; pip install "roformer-dist[bench]"'
# Both sides count their trainable parameters; more apart than this they are not the same model.
PARAMETER_TOLERANCE = 0.01
# Random weights and random targets: every model's loss is near log(vocab_size).
LOSS_TOLERANCE = 0.5


@dataclass(frozen=True)
class Shape:
    """The size of the model that all contenders build."""

    vocab_size: int = 8192
    hidden_size: int = 512
    num_layers: int = 4
    num_heads: int = 8
    gelu_size: int = 2048
    """Inner width of the encoder's MLP."""
    swiglu_size: int = 1376
    """Inner width of the decoder's MLP, about 8/3 of hidden_size."""


@dataclass(frozen=True)
class Job:
    """What one sample does; the child process gets it as JSON."""

    contender: str
    workload: str
    documents: tuple[int, ...]
    dtype: str
    threads: int
    steps: int
    warmup_steps: int
    shape: Shape
    mask_probability: float = 0.15
    seed: int = 0
    checkpointing: str = "none"
    mlp_tile_tokens: int | None = None

    @property
    def length(self) -> int:
        """Tokens in the row."""
        return sum(self.documents)

    def to_json(self) -> str:
        """For ``from_json`` in another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job that ``to_json`` wrote."""
        values = json.loads(text)
        return cls(**{**values, "documents": tuple(values["documents"]), "shape": Shape(**values["shape"])})


@dataclass(frozen=True)
class TrainSettings:
    """What the user chose."""

    lengths: tuple[int, ...]
    dtypes: tuple[str, ...]
    threads: int
    workloads: tuple[str, ...]
    peers: tuple[str, ...]
    samples: int
    steps: int
    warmup_steps: int
    mean_document: int
    lengths_from: str | None = None
    """A shards folder, or its URL, whose documents' lengths packed rows have; default: log-normal ones."""
    shape: Shape = Shape()

    def __post_init__(self) -> None:
        for option, chosen, known in (
            ("--peers", self.peers, PEERS),
            ("--workloads", self.workloads, WORKLOADS),
            ("--dtype", self.dtypes, ("fp32", "bf16")),
        ):
            check_choice(option, chosen, known)
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"--lengths {list(self.lengths)}: every length is at least 2 tokens")


METRICS = (
    # Of the process, all threads: holds on a machine that others use as well, where tokens/s do not.
    Metric(
        "cpu_seconds_per_step",
        "CPU s",
        lambda s: statistics.median(s.reported["step_cpu_seconds"]),
        lambda value: f"{value:.2f}",
    ),
    Metric("tokens_per_second", "tokens/s", lambda s: _rate(s), lambda value: f"{value:,.0f}"),
    Metric(
        "peak_bytes_above_import",
        "peak MiB",
        lambda s: s.reported["peak_bytes_above_import"],
        lambda value: f"{value / 2**20:,.0f}",
    ),
)
NOTES = (
    Metric(
        "parameters", "parameters", lambda s: s.reported["parameters"], lambda value: f"{value / 1e6:.2f} M"
    ),
    Metric("loss", "loss", lambda s: s.reported["loss"], lambda value: f"{value:.3f}"),
)


def train_groups(settings: TrainSettings) -> list[Group]:
    """One group for each workload, dtype and length; ours first, then the peers that know the workload.

    Raises:
        DataError: ``lengths_from`` holds no shards, or damaged ones.
    """
    corpus = None
    if settings.lengths_from and "packed" in settings.workloads:
        from roformer_dist.data.store import ShardStore

        corpus = ShardStore(settings.lengths_from).lengths.tolist()
    return [
        _group(settings, workload, dtype, length, corpus)
        for workload in settings.workloads
        for dtype in settings.dtypes
        for length in settings.lengths
    ]


def draw_documents(
    length: int, mean: int, *, corpus: Sequence[int] | None = None, seed: int = 0
) -> tuple[int, ...]:
    """Lengths of documents that fill a row: log-normal (sigma 1) around ``mean``, the last one cut off.

    Each has at least 2 tokens, so that each has a target.

    Args:
        corpus: lengths to draw from instead, with replacement.
    """
    generator = random.Random(seed)
    documents: list[int] = []
    left = length
    while left:
        drawn = generator.choice(corpus) if corpus else round(mean * generator.lognormvariate(-0.5, 1.0))
        document = min(left, max(2, drawn))
        # What would be left is too short for a document of its own.
        document += left - document if left - document < 2 else 0
        documents.append(document)
        left -= document
    return tuple(documents)


def same_work(ours: Sample, peer: Sample) -> str | None:
    """Why a peer's sample cannot stand beside ours, or None."""
    mine, theirs = ours.reported, peer.reported
    if mine["targets"] != theirs["targets"]:
        return f"{theirs['targets']:,} targets against our {mine['targets']:,}: not the same work"
    if abs(theirs["parameters"] / mine["parameters"] - 1) > PARAMETER_TOLERANCE:
        return f"{theirs['parameters']:,} parameters against our {mine['parameters']:,}: more than 1 % apart"
    if not abs(theirs["loss"] - mine["loss"]) <= LOSS_TOLERANCE:
        return f"loss {theirs['loss']:.3f} against our {mine['loss']:.3f}: not the same work"
    return None


def _group(
    settings: TrainSettings, workload: str, dtype: str, length: int, corpus: Sequence[int] | None
) -> Group:
    documents = (length,)
    if workload == "packed":
        documents = draw_documents(length, settings.mean_document, corpus=corpus)

    def contender(name: str, *, peer: bool) -> Contender:
        job = Job(
            name,
            workload,
            documents,
            dtype,
            settings.threads,
            settings.steps,
            settings.warmup_steps,
            settings.shape,
        )
        command = (sys.executable, "-m", "roformer_dist.bench.train_child", job.to_json())
        missing = NOT_INSTALLED if peer and importlib.util.find_spec("transformers") is None else None
        return Contender(name, "peer" if peer else "ours", command, missing, reports=True)

    names = [name for family in settings.peers for name in PEERS[family].get(workload, ())]
    title = f"{WORKLOADS[workload]}; {length:,} tokens, {dtype}, {settings.threads} threads"
    if workload == "packed":
        title += f"; documents: {len(documents)}, {min(documents):,} to {max(documents):,} tokens"
        title += f", drawn from {settings.lengths_from}" if corpus else ""
    return Group(
        title,
        {"workload": workload, "dtype": dtype, "length": length, "documents": list(documents)},
        [contender("ours", peer=False), *(contender(name, peer=True) for name in names)],
        check=same_work,
    )


def _rate(sample: Sample) -> float:
    return sample.reported["tokens"] / statistics.median(sample.reported["step_seconds"])
