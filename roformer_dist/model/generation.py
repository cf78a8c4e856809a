"""Continuing texts with a causal network, greedily or by drawing, from a cache of what it has read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from roformer_dist.kernels.attention import SequenceOps
from roformer_dist.model.cache import KVCache, Piece
from roformer_dist.model.heads import LanguageHead
from roformer_dist.model.positions import LearnedPositions
from roformer_dist.model.roformer import RoFormer
from roformer_dist.model.sampling import Sampling
from roformer_dist.model.sharing import CacheRanks

GREEDY = Sampling()


@dataclass(frozen=True)
class Generated:
    """What a prompt was continued with.

    Attributes:
        tokens: the new tokens; the last is the stop token where one ended it.
        finish: ``stop`` after a stop token, ``length`` after ``max_new_tokens``.
    """

    tokens: list[int]
    finish: Literal["stop", "length"]


def generate(
    network: RoFormer,
    ops: SequenceOps,
    prompts: Sequence[Sequence[int] | Tensor],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_ids: Collection[int] = (),
    prefill_chunk: int | None = None,
    refill: bool = True,
    on_token: Callable[[int, int], None] = lambda sequence, token: None,
    ranks: CacheRanks | None = None,
) -> list[Generated]:
    """Continue each prompt; the result for one does not depend on those beside it.

    Args:
        network: a causal language model; its mode (training or not) is restored afterwards.
        ops: how it attends, on one rank.
        prompts: token ids ``[n]`` of each prompt, n > 0, of any lengths.
        max_new_tokens: tokens after which a sequence ends.
        sampling: how a token is chosen; default: greedily.
        stop_ids: tokens that end a sequence, such as the end of a document.
        prefill_chunk: tokens that one forward reads at most, which bounds its memory; None: whole prompts.
        refill: what to do where a frequency rule depends on the length (dynamic, longrope) and the frequencies have
            just changed. True: read the sequence again, so that every token is the one that a forward over all
            tokens gives. False: keys turn to the new frequencies, but stay those of hidden states that were made
            under the old ones: as fast as any rule, and exact for a single layer only.
        on_token: called with (number of the prompt, token) for every new token as it comes.
        ranks: those that keep the cache together and share what is read; all of them call this with the same
            arguments and get the same tokens. A chunk's tokens are spread over them. None: this rank alone.

    Raises:
        ValueError: one line, for a model that does not generate, or prompts and numbers that do not fit.
    """
    tokens = [torch.as_tensor(prompt).tolist() for prompt in prompts]
    check_request(network, tokens, max_new_tokens, prefill_chunk=prefill_chunk, refill=refill)
    reader = _Reader(network, ops, tokens, max_new_tokens, prefill_chunk, refill, ranks)
    generators = [sampling.generator(i) for i in range(len(prompts))]
    results: list[Generated | None] = [None] * len(prompts)
    was_training = network.training
    network.eval()
    try:
        while active := [i for i, result in enumerate(results) if result is None]:
            chosen = [sampling.choose(x, generators[i]) for i, x in zip(active, reader.next_logits(active))]
            if ranks is not None:
                ranks.agree(chosen)
            for i, token in zip(active, chosen):
                reader.tokens[i].append(token)
                on_token(i, token)
                new = reader.tokens[i][reader.prompt_lengths[i] :]
                if token in stop_ids or len(new) == max_new_tokens:
                    results[i] = Generated(new, "stop" if token in stop_ids else "length")
                    reader.cache.forget(i)
    finally:
        network.train(was_training)
    return [result for result in results if result is not None]


class _Reader:
    """The logits after each sequence, read through a cache."""

    def __init__(
        self,
        network: RoFormer,
        ops: SequenceOps,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        prefill_chunk: int | None,
        refill: bool,
        ranks: CacheRanks | None,
    ) -> None:
        assert isinstance(network.head, LanguageHead), "checked"
        self._network, self._ops, self._head = network, ops, network.head
        self.tokens = list(prompts)
        self.prompt_lengths = [len(tokens) for tokens in self.tokens]
        self._chunk = prefill_chunk
        self._rereads = refill and _turns_with_length(network)
        # The last new token is never read.
        self.cache = KVCache(network, [n + max_new_tokens - 1 for n in self.prompt_lengths], ranks)
        self._frequencies: dict[int, tuple[Tensor, float]] = {}

    def next_logits(self, sequences: Sequence[int]) -> list[Tensor]:
        """Logits ``[vocab_size]`` after the last token of each sequence."""
        for i in sequences:
            if self._rereads:
                self._forget_if_turned(i)
        last: dict[int, Tensor] = {}
        while len(last) < len(sequences):
            pieces = self._next_pieces([i for i in sequences if i not in last])
            hidden = self.cache.read(self._ops, pieces)
            for piece, part in zip(pieces, hidden.split([len(piece.tokens) for piece in pieces])):
                if self.cache.lengths[piece.sequence] == len(self.tokens[piece.sequence]):
                    last[piece.sequence] = part[-1]
        with torch.no_grad():
            features = self._head(torch.stack([last[i] for i in sequences]))
            return list(F.linear(features, self._head.weight, self._head.bias))

    def _next_pieces(self, sequences: Sequence[int]) -> list[Piece]:
        """Tokens that are not read yet, at most as many as a forward may have."""
        room = self._chunk
        pieces = []
        for i in sequences:
            start, stop = self.cache.lengths[i], len(self.tokens[i])
            if room is not None:
                stop = min(stop, start + room)
                room -= stop - start
            if stop > start:
                tokens = torch.tensor(
                    self.tokens[i][start:stop], device=self._network.embedding.weight.device
                )
                pieces.append(Piece(i, tokens, extent=len(self.tokens[i])))
        return pieces

    def _forget_if_turned(self, sequence: int) -> None:
        now = self._network.rotary.frequencies(len(self.tokens[sequence]))
        before = self._frequencies.get(sequence)
        if before is not None and not (torch.equal(before[0], now[0]) and before[1] == now[1]):
            self.cache.forget(sequence)
        self._frequencies[sequence] = now


def _turns_with_length(network: RoFormer) -> bool:
    return network.rotary.depends_on_length and network.config.position.kind == "rotary"


def check_request(
    network: RoFormer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    prefill_chunk: int | None,
    refill: bool,
) -> None:
    """ValueError in one line where ``generate`` could not do what it is asked for."""
    if not isinstance(network.head, LanguageHead):
        raise ValueError("a classification model has no next token to generate; give a causal language model")
    if network.head.masked:
        raise ValueError(
            "a masked language model has no next token to generate; give a causal language model"
        )
    model = network.config
    if _turns_with_length(network) and not refill and "linear" in model.layers:
        raise ValueError(
            f"model.rope.scaling = {model.rope.scaling.kind!r} without refill: the state of a linear layer is a "
            "sum of rotated keys that cannot be turned again; generate with refill"
        )
    for name, value in (("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value} must be at least 1")
    if not prompts:
        raise ValueError("there are no prompts; give at least one")
    table = network.positions.added
    room = table.table.num_embeddings if isinstance(table, LearnedPositions) else None
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} has no tokens; there is nothing to continue")
        if not 0 <= min(prompt) <= max(prompt) < network.config.vocab_size:
            raise ValueError(
                f"prompt {i} has a token outside the vocabulary of {network.config.vocab_size}; use the model's "
                "own tokenizer"
            )
        if room is not None and len(prompt) + max_new_tokens - 1 > room:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, and with max_new_tokens = {max_new_tokens} would pass "
                f"model.position.max_seq_len = {room}, the positions that have learned vectors; shorten them"
            )
