"""``roformer-dist import hf`` and ``export hf``. Whatever is heavy is imported when used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import_app = typer.Typer(help="Models from elsewhere as checkpoints.", no_args_is_help=True)
export_app = typer.Typer(help="Checkpoints as models for elsewhere.", no_args_is_help=True)


@import_app.command("hf")
def import_hf(
    source: Annotated[str, typer.Argument(help="Folder of a Hugging Face model, or its name on the hub.")],
    out: Annotated[
        Path, typer.Option("--out", help="New directory for checkpoint, model section, tokenizer.")
    ],
    ignore_keys: Annotated[
        list[str] | None,
        typer.Option("--ignore-key", help="A key of config.json that changes nothing; may be repeated."),
    ] = None,
) -> None:
    """A Hugging Face RoFormer, Llama, Qwen2, Qwen3 or GPT-NeoX as a checkpoint to start from, exactly.

    Example: roformer-dist import hf models/Llama-3.2-1B --out imported/llama
    """
    from roformer_dist.exchange import import_hf as run_import

    print("\n".join(run_import(source, out, ignore_keys=ignore_keys or ())))


@import_app.callback()
def _import() -> None:
    """Keeps ``hf`` a command of its own."""


@export_app.command("hf")
def export_hf(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint, or a run's or import's directory for its newest.")
    ],
    out: Annotated[Path, typer.Option("--out", help="New directory for the Hugging Face model.")],
    max_position_embeddings: Annotated[
        int | None,
        typer.Option(
            min=1, help="Length it is said to be good for (RoFormer: its table's); default: as trained."
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer, ours or a Hugging Face folder; default: the run's.")
    ] = None,
) -> None:
    """A checkpoint as a folder that transformers' AutoModel and AutoTokenizer load.

    Example: roformer-dist export hf runs/quickstart --out exported
    """
    from roformer_dist.exchange import export_hf as run_export

    lines = run_export(
        checkpoint,
        out,
        max_position_embeddings=max_position_embeddings,
        max_shard_size=max_shard_size,
        dtype=dtype,
        tokenizer=tokenizer,
    )
    print("\n".join(lines))


@export_app.callback()
def _export() -> None:
    """Keeps ``hf`` a command of its own."""
