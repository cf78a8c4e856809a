"""A tokenizer that came with an import, for text in and out of generation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from roformer_dist.interop.huggingface import require_transformers
from roformer_dist.interop.settings import HuggingFaceError

# Tokens of the prompt that a new one is decoded after: what it means may depend on those before it.
_CONTEXT = 8


class ImportedTokenizer:
    """Hugging Face's own, from the files that the import copied."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            HuggingFaceError: transformers is missing or cannot read the files.
        """
        transformers = require_transformers()
        self.path = folder
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # transformers' errors have no common base
            raise HuggingFaceError(
                f"{folder}: not a tokenizer that transformers reads: {' '.join(str(error).split())}"
            ) from None
        self.vocab_size: int = len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, after what the tokenizer puts before it (BOS), without what it would end it with."""
        ids = list(self._tokenizer.encode(text))
        plain = list(self._tokenizer.encode(text, add_special_tokens=False))
        special = set(self._tokenizer.all_special_ids)
        while ids[-1:] != plain[-1:] and ids and ids[-1] in special:
            ids.pop()
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; special tokens give nothing."""
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class ImportedStream:
    """Text as tokens come after ``prompt``, never half a character; each is decoded behind those before it."""

    def __init__(self, tokenizer: ImportedTokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        self._first, self._given = 0, len(self._ids)

    def push(self, token: int) -> str:
        """The text that became certain with ``token``; may be empty."""
        self._ids.append(token)
        return self._next(certain=True)

    def finish(self) -> str:
        """The rest, as it is."""
        return self._next(certain=False)

    def _next(self, *, certain: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._first : self._given])
        after = self._tokenizer.decode(self._ids[self._first :])
        if len(after) <= len(before) or (certain and after.endswith("\ufffd")):
            return ""
        self._first, self._given = self._given, len(self._ids)
        return after[len(before) :]
