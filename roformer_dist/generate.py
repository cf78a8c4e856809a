"""``roformer-dist generate``: a checkpoint continues a text. Whatever is heavy is imported when used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from roformer_dist.model.sampling import Sampling


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
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON on standard output.")
    ] = False,
) -> None:
    """Continue a text with a trained causal model, as the tokens come.

    Example: roformer-dist generate --checkpoint runs/quickstart --prompt "Once upon a time" --temperature 0.8
    """
    import json

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
    )
    print(json.dumps(result, indent=2) if json_output else "")


def _text_of(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {file}: not UTF-8 text: {error}") from None


def run_generate(
    checkpoint: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_at_eos: bool,
    prefill_chunk: int | None,
    refill: bool,
    overrides: Sequence[str],
    show: Callable[[str], None],
) -> dict[str, Any]:
    """Continue ``prompt`` and return the text and how it came about; see ``model.generation.generate``.

    Args:
        checkpoint: a checkpoint, or a run's directory for its newest one.
        overrides: ``model.key=value`` changes of its configuration.
        show: called with every bit of new text as soon as it is certain.

    Raises:
        ValueError: one line, for a checkpoint, prompt or numbers that do not fit.
    """
    from roformer_dist.config.data import CausalObjective
    from roformer_dist.data.text_stream import TextStream
    from roformer_dist.data.tokenizer import Tokenizer
    from roformer_dist.engine.initial import find_checkpoint
    from roformer_dist.kernels.attention import choose_kernel
    from roformer_dist.model.generation import generate as continue_prompts
    from roformer_dist.parallel.sequence_ops import single_sequence_ops
    from roformer_dist.trained import load_trained

    path = find_checkpoint(checkpoint, report=lambda text: print(text, file=sys.stderr, flush=True))
    trained = load_trained(path, overrides)
    config = trained.config
    if not isinstance(config.objective, CausalObjective):
        raise ValueError(
            f"{trained.path}: objective.kind = {config.objective.kind!r} has no next token to generate; give a "
            "causal checkpoint"
        )
    tokenizer = Tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"{tokenizer.path}: has {tokenizer.vocab_size} tokens, model.vocab_size = {config.model.vocab_size}; "
            "it is not the tokenizer that the checkpoint was trained with"
        )
    ids = tokenizer.encode(prompt).tolist()
    if not ids:
        raise ValueError("the prompt is empty; give some text to continue")
    # The training's kernel may be one of another device.
    ops = single_sequence_ops(choose_kernel("auto", "cpu")[0])
    stream = TextStream(tokenizer)
    text: list[str] = []

    def say(piece: str) -> None:
        text.append(piece)
        show(piece)

    (result,) = continue_prompts(
        trained.network,
        ops,
        [ids],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=(tokenizer.eos_id,) if stop_at_eos else (),
        prefill_chunk=prefill_chunk,
        refill=refill,
        on_token=lambda _, token: say(stream.push(token)),
    )
    say(stream.finish())
    return {
        "checkpoint": str(trained.path),
        "step": trained.step,
        "prompt": prompt,
        "prompt_tokens": len(ids),
        "text": "".join(text),
        "tokens": result.tokens,
        "finish": result.finish,
        "seed": sampling.seed,
    }
