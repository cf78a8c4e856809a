"""``roformer-dist bench``: ours and named peers in turn. It parses; what is heavy is imported when used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

bench_app = typer.Typer(help="Measure ours and named peers in turn.", no_args_is_help=True)

JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="Also write figures, machine and versions here.", metavar="FILE"),
]
Timeout = Annotated[float, typer.Option(help="Seconds that one sample may take.", min=1)]
Samples = Annotated[int, typer.Option(help="Processes of each contender that count.", min=1)]


@bench_app.command()
def startup(samples: Samples = 5, timeout: Timeout = 300.0, json_file: JsonFile = None) -> None:
    """Until the command line answers: ours beside deepspeed and torchrun.

    Example: roformer-dist bench startup --json startup.json
    """
    from roformer_dist.bench.harness import Limits
    from roformer_dist.bench.run import Plan, run_benchmark
    from roformer_dist.bench.startup import METRICS, startup_group

    plan = Plan(
        "startup",
        [startup_group()],
        METRICS,
        {"samples": samples, "warmup_rounds": 1, "timeout": timeout},
        samples=samples,
        warmup_rounds=1,
        limits=Limits(timeout),
    )
    raise typer.Exit(run_benchmark(plan, json_file))


@bench_app.command()
def train(
    lengths: Annotated[str, typer.Option(help="Tokens in the row: 1024,4096,…")] = "1024,4096",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or both: fp32,bf16.")] = "fp32",
    threads: Annotated[int, typer.Option(help="Threads of every contender.", min=1)] = 2,
    peers: Annotated[
        str, typer.Option(help="hf-roformer, hf-llama, both, or none.")
    ] = "hf-roformer,hf-llama",
    workloads: Annotated[str, typer.Option(help="Of masked, causal, packed.")] = "masked,causal,packed",
    samples: Samples = 3,
    steps: Annotated[int, typer.Option(help="Timed steps in each process.", min=1)] = 2,
    warmup_steps: Annotated[int, typer.Option(help="Steps before them.", min=0)] = 1,
    mean_document: Annotated[int, typer.Option(help="Mean tokens of a packed document.", min=2)] = 512,
    lengths_from: Annotated[
        str | None,
        typer.Option(
            help="Shards, a folder or URL: packed documents are as long as theirs.", metavar="SHARDS"
        ),
    ] = None,
    memory_limit: Annotated[
        float | None, typer.Option(help="GiB a process may take; default: what is available.", min=0.1)
    ] = None,
    timeout: Timeout = 1800.0,
    json_file: JsonFile = None,
) -> None:
    """Forward and backward of one step: tokens/s and peak memory, beside Hugging Face's models.

    Example: roformer-dist bench train --lengths 1024,4096 --dtype bf16 --threads 2
    """
    from roformer_dist.bench.run import run_benchmark, train_plan
    from roformer_dist.bench.train import TrainSettings

    settings = TrainSettings(
        lengths=_integers(lengths),
        dtypes=_names(dtype),
        threads=threads,
        workloads=_names(workloads),
        peers=() if peers == "none" else _names(peers),
        samples=samples,
        steps=steps,
        warmup_steps=warmup_steps,
        mean_document=mean_document,
        lengths_from=lengths_from,
    )
    raise typer.Exit(run_benchmark(train_plan(settings, timeout, memory_limit), json_file))


@bench_app.command()
def sequence(
    lengths: Annotated[str, typer.Option(help="Tokens in the row: 4096,16384,…")] = "4096,16384",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or both: fp32,bf16.")] = "bf16",
    processes: Annotated[
        int, typer.Option(help="That share the row, one thread each; alone: one with as many threads.", min=2)
    ] = 2,
    peers: Annotated[
        str, typer.Option(help="distributed-attention, ulysses-hf, both, or none.")
    ] = "distributed-attention,ulysses-hf",
    samples: Samples = 3,
    steps: Annotated[int, typer.Option(help="Timed steps in each process.", min=1)] = 2,
    warmup_steps: Annotated[int, typer.Option(help="Steps before them.", min=0)] = 1,
    timeout: Timeout = 1800.0,
    json_file: JsonFile = None,
) -> None:
    """One row over several processes: Ulysses and ring over one process, beside DeepSpeed's two forms of Ulysses.

    Example: roformer-dist bench sequence --lengths 4096,16384 --json sequence.json
    """
    from roformer_dist.bench.run import run_benchmark, sequence_plan
    from roformer_dist.bench.sequence import SequenceSettings

    chosen = () if peers == "none" else _names(peers)
    settings = SequenceSettings(
        _integers(lengths), _names(dtype), processes, chosen, samples, steps, warmup_steps
    )
    raise typer.Exit(run_benchmark(sequence_plan(settings, timeout), json_file))


@bench_app.command()
def memory(
    lengths: Annotated[str, typer.Option(help="Tokens in the row.")] = "8192,32768,131072",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "bf16",
    threads: Annotated[int, typer.Option(help="Threads of every process.", min=1)] = 2,
    document: Annotated[int, typer.Option(help="Tokens of the longest document.", min=2)] = 1024,
    layers: Annotated[int, typer.Option(help="Layers of the decoder.", min=1)] = 4,
    timeout: Timeout = 1800.0,
    json_file: JsonFile = None,
) -> None:
    """Peak memory of a step against the length of the row: bytes a token, plain, checkpointed and tiled.

    Example: roformer-dist bench memory --layers 2 --json memory.json
    """
    from roformer_dist.bench.memory import MemorySettings
    from roformer_dist.bench.run import memory_plan, run_benchmark
    from roformer_dist.bench.train import Shape

    settings = MemorySettings(_integers(lengths), dtype, threads, document, Shape(num_layers=layers))
    raise typer.Exit(run_benchmark(memory_plan(settings, timeout), json_file))


@bench_app.command()
def gpu(
    tasks: Annotated[
        str, typer.Option(help="Of numerics, attention, spread, step, longest.")
    ] = "numerics,attention,spread,step,longest",
    samples: Samples = 1,
    timeout: Timeout = 900.0,
    json_file: JsonFile = None,
) -> None:
    """All figures that need a CUDA device: kernels, a row over in-process ranks, a 1B decoder, the longest row.

    Example: roformer-dist bench gpu --json gpu.json
    """
    from roformer_dist.bench.run import gpu_plan, run_benchmark

    raise typer.Exit(run_benchmark(gpu_plan(_names(tasks), samples, timeout), json_file))


@bench_app.command()
def attention(
    ranks: Annotated[
        int, typer.Option(help="Processes of a row: every Ulysses x ring mesh of them.", min=2)
    ] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens on each of them.", min=1)] = 1024,
    heads: Annotated[int, typer.Option(help="Query heads.", min=1)] = 32,
    kv_heads: Annotated[int, typer.Option(help="Key and value heads.", min=1)] = 8,
    head_dim: Annotated[int, typer.Option(help="Width of a head.", min=1)] = 64,
    document: Annotated[
        int | None, typer.Option(help="Median tokens of a document; default: one document a row.", min=1)
    ] = None,
    sigma: Annotated[float, typer.Option(help="Spread of the documents' lengths (lognormal).", min=0)] = 0.7,
    window: Annotated[int | None, typer.Option(help="Positions that a query sees.", min=1)] = None,
    balance_ranks: Annotated[
        str, typer.Option(help="Sizes of a ring whose work is compared.")
    ] = "2,8,64,256,1024",
    balance_tokens: Annotated[int, typer.Option(help="Tokens on each of its ranks.", min=1)] = 8192,
    lengths_from: Annotated[
        str | None,
        typer.Option(
            help="Shards, a folder or URL: balance for their documents' lengths too.", metavar="SHARDS"
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Bytes sent, buffers and balance of every sequence-parallel scheme, counted and against the formula.

    Example: roformer-dist bench attention --ranks 8 --heads 32 --kv-heads 8
    """
    from roformer_dist.bench.attention import AttentionSettings, run_attention

    settings = AttentionSettings(
        ranks=ranks,
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        documents=None if document is None else (document, sigma),
        window=window,
        balance_ranks=_integers(balance_ranks, "--balance-ranks"),
        balance_tokens=balance_tokens,
        lengths_from=lengths_from,
    )
    raise typer.Exit(run_attention(settings, json_file))


@bench_app.command()
def tokenize(
    inputs: Annotated[
        list[str], typer.Option("--input", help="Text, as for 'data shards'; may be repeated.")
    ],
    workloads: Annotated[str, typer.Option(help="Of documents, long, shards.")] = "documents,long,shards",
    tokenizer: Annotated[
        Path | None, typer.Option(help="A .model file; default: one trained on the text.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Of the tokenizer that is trained.")] = 8192,
    processes: Annotated[int, typer.Option(help="Independent encoders, or workers.", min=1)] = 2,
    max_mb: Annotated[float, typer.Option(help="MB of the text that are used.", min=0.01)] = 16.0,
    long_mb: Annotated[float, typer.Option(help="MB of the one long document.", min=0.01)] = 4.0,
    samples: Samples = 3,
    timeout: Timeout = 1800.0,
    json_file: JsonFile = None,
) -> None:
    """From text to tokens: ours beside sentencepiece itself, Hugging Face's tokenizers, and datatrove.

    Example: roformer-dist bench tokenize --input corpus/train --json tokenize.json
    """
    from roformer_dist.bench.run import run_tokenize
    from roformer_dist.bench.tokenize import TokenizeSettings

    settings = TokenizeSettings(
        tuple(inputs), _names(workloads), tokenizer, vocab_size, processes, max_mb, long_mb
    )
    raise typer.Exit(run_tokenize(settings, samples, timeout, json_file))


@bench_app.command()
def data(
    shards: Annotated[str, typer.Option(help="Folder that data shards wrote.", metavar="DIR")],
    plan: Annotated[str, typer.Option(help="Plan that data pack made of them.", metavar="FILE")],
    peers: Annotated[
        str, typer.Option(help="Of webdataset, mosaicml-streaming, litdata, megatron-energon, or none.")
    ] = "webdataset,mosaicml-streaming,litdata,megatron-energon",
    peer_python: Annotated[
        list[str] | None,
        typer.Option(help="Interpreter of a peer with an environment of its own.", metavar="NAME=PATH"),
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows of a batch.", min=1)] = 8,
    epochs: Annotated[int, typer.Option(help="Warm epochs in each process.", min=1)] = 3,
    samples: Samples = 3,
    timeout: Timeout = 1800.0,
    json_file: JsonFile = None,
) -> None:
    """Packed rows into batches: tokens/s cold and warm, and memory, beside streaming data sets.

    Example: roformer-dist bench data --shards shards/train --plan train.npz --peers webdataset
    """
    from roformer_dist.bench.data import DataSettings, run_data

    pythons = dict(_assignment(text) for text in peer_python or ())
    chosen = () if peers == "none" else _names(peers)
    settings = DataSettings(shards, plan, chosen, pythons, batch, epochs, samples)
    raise typer.Exit(run_data(settings, timeout, json_file))


def _assignment(text: str) -> tuple[str, str]:
    name, found, path = text.partition("=")
    if not found or not path:
        raise ValueError(f"--peer-python {text!r}: write NAME=PATH, such as litdata=/opt/litdata/bin/python")
    return name, path


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _integers(text: str, option: str = "--lengths") -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"{option} {text!r}: write whole numbers with commas between, such as 1024,4096"
        ) from None
