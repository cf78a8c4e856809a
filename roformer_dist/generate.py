"""Behind ``roformer-dist generate``: a checkpoint continues a text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from roformer_dist.config.data import CausalObjective
from roformer_dist.data.json_tokenizer import JsonTokenizer, is_json
from roformer_dist.data.text_stream import TextStream
from roformer_dist.data.tokenizer import Tokenizer
from roformer_dist.engine.agreement import together
from roformer_dist.engine.group import joined_group
from roformer_dist.engine.initial import find_together
from roformer_dist.interop.text import ImportedStream, ImportedTokenizer
from roformer_dist.interop.tokenizer import TOKENIZER_FILES, TOKENIZER_FOLDER
from roformer_dist.kernels.attention import choose_kernel
from roformer_dist.model.generation import check_request, generate
from roformer_dist.model.sampling import Sampling
from roformer_dist.parallel.sequence_ops import single_sequence_ops
from roformer_dist.parallel.shared_cache import SharedCache
from roformer_dist.trained import Trained, load_trained


class Stream(Protocol):
    """Text from tokens as they come."""

    def push(self, token: int) -> str:
        """The text that became certain with ``token``."""
        ...

    def finish(self) -> str:
        """The rest, as it is."""
        ...


@dataclass(frozen=True)
class Prompt:
    """A text as the checkpoint's tokenizer reads it.

    Attributes:
        ids: its tokens.
        stream: makes text of those that follow.
        eos_ids: the tokens that end a document.
    """

    ids: list[int]
    stream: Stream
    eos_ids: tuple[int, ...]


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
    processes: int | None = None,
) -> dict[str, Any] | None:
    """Continue ``prompt`` and return the text and how it came about; see ``model.generation.generate``.

    Args:
        checkpoint: a checkpoint, or a run's or an import's directory for its newest one.
        overrides: ``model.key=value`` changes of its configuration.
        show: called with every bit of new text as soon as it is certain, on the first rank.
        processes: how many share the text, where a launcher started them.

    Returns:
        None on all ranks but the first.

    Raises:
        ValueError: one line, for a checkpoint, prompt or numbers that do not fit.
    """
    with joined_group(processes) as group:
        world, device = group.world, group.device
        path = find_together(checkpoint, world, device, report=lambda text: print(text, file=sys.stderr))
        trained = together(lambda: load_trained(path, overrides, device=device), world, device)
        read = together(lambda: _read(trained, prompt), world, device)
        dtype = trained.network.embedding.weight.dtype
        # The training's kernel may be one of another device.
        kernel, _ = together(lambda: choose_kernel("auto", device, dtype), world, device)
        limits = {"prefill_chunk": prefill_chunk, "refill": refill}
        together(lambda: check_request(trained.network, [read.ids], max_new_tokens, **limits), world, device)
        text: list[str] = []

        def say(piece: str) -> None:
            text.append(piece)
            if group.leads:
                show(piece)

        (result,) = generate(
            trained.network,
            single_sequence_ops(kernel),
            [read.ids],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_ids=read.eos_ids if stop_at_eos else (),
            on_token=lambda _, token: say(read.stream.push(token)),
            ranks=SharedCache(kernel, world, device) if world.size > 1 else None,
            **limits,
        )
        say(read.stream.finish())
    if not group.leads:
        return None
    return {
        "checkpoint": str(trained.path),
        "step": trained.step,
        "prompt": prompt,
        "prompt_tokens": len(read.ids),
        "text": "".join(text),
        "tokens": result.tokens,
        "finish": result.finish,
        "seed": sampling.seed,
    }


def _read(trained: Trained, prompt: str) -> Prompt:
    """The prompt in the checkpoint's own tokens; ValueError in one line where there is nothing to continue."""
    if not isinstance(trained.objective, CausalObjective):
        raise ValueError(
            f"{trained.path}: objective.kind = {trained.objective.kind!r} has no next token to generate; give a "
            "causal checkpoint"
        )
    named = None if trained.config is None else Path(trained.config.data.tokenizer)
    if named is not None and not is_json(named):
        tokenizer = Tokenizer(named)
        ids = tokenizer.encode(prompt).tolist()
        read = Prompt(ids, TextStream(tokenizer), (tokenizer.eos_id,))
    elif named is not None:
        tokenizer = ImportedTokenizer(named.parent)
        ids = tokenizer.encode(prompt)
        read = Prompt(ids, ImportedStream(tokenizer, ids), (JsonTokenizer(named).eos_id,))
    else:
        tokenizer = ImportedTokenizer(_imported_tokenizer(trained))
        ids = tokenizer.encode(prompt)
        read = Prompt(ids, ImportedStream(tokenizer, ids), _imported_eos(trained))
    if trained.config is not None and tokenizer.vocab_size > trained.model.vocab_size:
        raise ValueError(
            f"{tokenizer.path}: has {tokenizer.vocab_size} tokens, model.vocab_size = {trained.model.vocab_size}; "
            "it is not the tokenizer that the checkpoint was trained with"
        )
    if not ids:
        raise ValueError("the prompt is empty; give some text to continue")
    return read


def _imported_tokenizer(trained: Trained) -> Path:
    folder = trained.path.parent.parent / TOKENIZER_FOLDER
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{trained.path}: holds parameters alone, and {folder} has no tokenizer; put the model's tokenizer files "
            "there, or give a run that started from it (checkpoint.init_from)"
        )
    return folder


def _imported_eos(trained: Trained) -> tuple[int, ...]:
    ids = trained.token_ids.get("eos_token_id")
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)
