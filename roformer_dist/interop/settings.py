"""A Hugging Face configuration, read strictly: every key is used, known to change nothing, or an error."""

from __future__ import annotations

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


class HuggingFaceError(ValueError):
    """What cannot be carried over exactly; one line naming the key or weight, and what would work."""


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

    def take_or(self, key: str, default: Any) -> Any:
        """The value of ``key``, ``default`` if it is not there."""
        return self._left.pop(key, default)

    def peek(self, key: str) -> Any:
        """The value of ``key`` without taking it, None if it is not there."""
        return self._left.get(key)

    def check(self, fits: bool, key: str, value: object) -> None:
        """HuggingFaceError naming ``key`` unless it ``fits``."""
        if not fits:
            raise HuggingFaceError(f"{self.source}: {key} = {value!r} cannot be carried over")

    def note_attention_dropout(self, key: str) -> None:
        """Take ``key``, which only matters in training and which this framework refuses there."""
        if self._left.pop(key, 0):
            self.notes.append(f"{key} is left out: attention has no dropout here; logits do not depend on it")

    def require(self, key: str, *wanted: object) -> None:
        """Take ``key``, of which only the values ``wanted`` can be carried over; a missing one is fine."""
        value = self._left.pop(key, wanted[0])
        if value not in wanted:
            raise HuggingFaceError(
                f"{self.source}: {key} = {value!r} cannot be carried over; only {wanted[0]!r} can"
            )

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """HuggingFaceError for the first key that was neither taken nor is known to change nothing."""
        unknown = sorted(self._left.keys() - HARMLESS - set(ignored))
        if unknown:
            key = unknown[0]
            raise HuggingFaceError(
                f"{self.source}: {key} = {self._left[key]!r} is not understood; if it does not change what the model "
                f"computes, pass --ignore-key {key}"
            )
