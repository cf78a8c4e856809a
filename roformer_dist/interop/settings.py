"""A Hugging Face configuration, read strictly: every key is used, known to change nothing, or an error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

# Keys of transformers' base class and of older releases that say how a model is run or shown, not what it computes.
HARMLESS = {
    "_name_or_path",
    "architectures",
    "chunk_size_feed_forward",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "num_labels",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "transformers_version",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "gradient_checkpointing",
    "attn_implementation",
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


# The largest sizes that are read, so that a damaged number is an error before anything is made of it.
_WIDEST = 2**20
LARGEST = {
    "vocab_size": 2**31,
    "type_vocab_size": _WIDEST,
    "hidden_size": _WIDEST,
    "embedding_size": _WIDEST,
    "intermediate_size": _WIDEST,
    "num_hidden_layers": 1000,
    "num_attention_heads": _WIDEST,
    "num_key_value_heads": _WIDEST,
    "head_dim": _WIDEST,
    "num_labels": _WIDEST,
    "max_position_embeddings": 2**40,
}


class HuggingFaceError(ValueError):
    """What cannot be carried over exactly; one line naming the key or weight, and what would work."""


def check_sizes(values: dict[str, Any], source: str) -> None:
    """HuggingFaceError unless every size in ``values`` is a whole number that a model can have."""
    for key, largest in LARGEST.items():
        if values.get(key) is not None:
            whole_number(values[key], f"{source}: {key}", largest)


def whole_number(value: object, name: str, largest: int) -> int:
    """``value``, from 1 to ``largest``; HuggingFaceError that begins with ``name`` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise HuggingFaceError(f"{name} = {shown(value)} must be a whole number from 1 to {largest}")
    return value


def number(value: object, name: str) -> float:
    """``value`` as a float; HuggingFaceError that begins with ``name`` unless it is a finite number."""
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond every float
        pass
    raise HuggingFaceError(f"{name} = {shown(value)} must be a finite number")


def flag(value: object, name: str) -> bool:
    """``value``; HuggingFaceError that begins with ``name`` unless it is true or false."""
    if not isinstance(value, bool):
        raise HuggingFaceError(f"{name} = {shown(value)} must be true or false")
    return value


def shown(value: object) -> str:
    """``value`` in at most 80 characters, for a message."""
    try:
        text = repr(value)
    except ValueError:  # more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


class Settings:
    """The values of a ``config.json``, taken one by one; ``finish`` fails for one that nobody took."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self._left = dict(values)
        self.source = source
        self.notes: list[str] = []

    def take(self, key: str) -> Any:
        """The value of ``key``, which is required.

        Raises:
            HuggingFaceError: it is not there.
        """
        if key not in self._left:
            raise HuggingFaceError(f"{self.source}: {key} is missing")
        return self._left.pop(key)

    def number(self, key: str) -> float:
        """Take ``key``, a finite number."""
        return number(self.take(key), f"{self.source}: {key}")

    def flag(self, key: str) -> bool:
        """Take ``key``, true or false."""
        return flag(self.take(key), f"{self.source}: {key}")

    def take_or(self, key: str, default: Any) -> Any:
        """The value of ``key``, ``default`` if it is not there."""
        return self._left.pop(key, default)

    def peek(self, key: str) -> Any:
        """The value of ``key`` without taking it, None if it is not there."""
        return self._left.get(key)

    def check(self, fits: bool, key: str, value: object) -> None:
        """HuggingFaceError naming ``key`` unless it ``fits``."""
        if not fits:
            raise HuggingFaceError(f"{self.source}: {key} = {shown(value)} cannot be carried over")

    def note_attention_dropout(self, key: str) -> None:
        """Take ``key``, which only matters in training and which this framework refuses there."""
        if self._left.pop(key, 0):
            self.notes.append(f"{key} is left out: attention has no dropout here; logits do not depend on it")

    def require(self, key: str, *wanted: object) -> None:
        """Take ``key``, of which only the values ``wanted`` can be carried over; a missing one is fine."""
        value = self._left.pop(key, wanted[0])
        if value not in wanted:
            raise HuggingFaceError(
                f"{self.source}: {key} = {shown(value)} cannot be carried over; only {wanted[0]!r} can"
            )

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """HuggingFaceError for the first key that was neither taken nor is known to change nothing.

        Args:
            ignored: keys that the user says change nothing; one that says nothing new is a mistake of theirs.
        """
        unknown = self._left.keys() - HARMLESS
        for key in ignored:
            if key not in unknown:
                raise HuggingFaceError(
                    f"--ignore-key {key}: {self.source} has no such key that is not understood; leave the option out"
                )
        if left := sorted(unknown - set(ignored)):
            key = left[0]
            raise HuggingFaceError(
                f"{self.source}: {key} = {shown(self._left[key])} is not understood; if it does not change what the "
                f"model computes, pass --ignore-key {key}"
            )
