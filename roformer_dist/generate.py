"""Behind ``roformer-dist generate``: a checkpoint continues a text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from roformer_dist.config.data import CausalObjective
from roformer_dist.data.text_stream import TextStream
from roformer_dist.data.tokenizer import Tokenizer
from roformer_dist.engine.initial import find_checkpoint
from roformer_dist.kernels.attention import choose_kernel
from roformer_dist.model.generation import generate
from roformer_dist.model.sampling import Sampling
from roformer_dist.parallel.sequence_ops import single_sequence_ops
from roformer_dist.trained import load_trained


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

    (result,) = generate(
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
