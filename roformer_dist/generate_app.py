"""``roformer-dist generate``: a checkpoint continues a text. Whatever is heavy is imported when used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ProcessesOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Processes of this machine that share every sequence; under a launcher, its own number."
    ),
]


def start_processes(processes: int | None) -> None:
    """Where so many are asked for and no launcher has started this one: run the command on them, and end."""
    import os

    from roformer_dist.engine.ranks import read_ranks
    from roformer_dist.launching.local import run_this_command

    if processes and processes > 1 and read_ranks(os.environ).launcher == "none":
        raise typer.Exit(run_this_command(processes))


def generate(
    checkpoint: Annotated[
        Path, typer.Option("--checkpoint", help="A checkpoint, or a run's directory for its newest.")
    ],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.", metavar="TEXT")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="UTF-8 file to continue, instead of --prompt.", metavar="FILE")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens after which it ends.")] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token, 1 draws as learned.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many likeliest tokens.")] = None,
    top_p: Annotated[
        float, typer.Option(help="Draw from the fewest tokens that have this probability together.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    stop_at_eos: Annotated[
        bool, typer.Option("--stop-at-eos/--no-stop-at-eos", help="End where a document ends.")
    ] = True,
    prefill_chunk: Annotated[
        int, typer.Option(help="Tokens of the prompt read at a time, which bounds memory.")
    ] = 4096,
    refill: Annotated[
        bool,
        typer.Option(
            "--refill/--no-refill",
            help="Under dynamic and longrope scaling, read all again when frequencies change (exact, slower).",
        ),
    ] = True,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Override one key, model.key=value; may be repeated.", metavar="KEY=VALUE"
        ),
    ] = None,
    processes: ProcessesOption = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON on standard output.")
    ] = False,
) -> None:
    """Continue a text with a trained causal model, as the tokens come.

    Example: roformer-dist generate --checkpoint runs/quickstart --prompt "Once upon a time" --temperature 0.8
    """
    import json

    start_processes(processes)
    from roformer_dist.generate import run_generate
    from roformer_dist.model.sampling import Sampling

    if (prompt is None) == (prompt_file is None):
        raise ValueError("give one of --prompt TEXT and --prompt-file FILE")
    result = run_generate(
        checkpoint,
        _text_of(prompt_file) if prompt_file else prompt or "",
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, seed),
        stop_at_eos=stop_at_eos,
        prefill_chunk=prefill_chunk,
        refill=refill,
        overrides=overrides or [],
        show=(lambda text: None) if json_output else (lambda text: print(text, end="", flush=True)),
        processes=processes,
    )
    if result is None:  # another rank prints
        return
    print(json.dumps(result, indent=2) if json_output else "")


def _text_of(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {file}: not UTF-8 text: {error}") from None
