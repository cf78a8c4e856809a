"""The tokenizer of an imported model, a ``tokenizer.json`` of Hugging Face's, for shards in its tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from roformer_dist.data.errors import DataError
from roformer_dist.data.files import sha256_json
from roformer_dist.data.tokenizer import Tokenizer, check_text

NO_TOKEN = -1
# Beside the file: which of its tokens ends a document, pads, begins a text.
_FILES = ("tokenizer_config.json", "special_tokens_map.json")


class JsonTokenizer:
    """Encodes as transformers does, but that the names of special tokens in a text stay text.

    A document begins with what the tokenizer puts before a text (BOS, for many), and without what it
    would put after it. Unlike ``Tokenizer`` it may not give every text back.

    Args:
        path: ``tokenizer.json``; ``tokenizer_config.json`` beside it says which tokens are special.

    Raises:
        DataError: no such file, not a tokenizer, or the package that reads it is missing.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise DataError(
                f"{path}: the tokenizers package reads it: pip install 'roformer-dist[hf]'"
            ) from None
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{path}: no such tokenizer; an import has one (tokenizer/tokenizer.json)")
        data = self.path.read_bytes()
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the package's errors have no common base
            raise DataError(
                f"{path}: not a tokenizer.json: {' '.join(str(error).split())}; give a model's own"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self._files = self._read_files()
        self._prefix = self._find_prefix()

    @property
    def eos_id(self) -> int:
        """What ends a document; ``DataError`` when the files beside the tokenizer do not say."""
        found = self._special("eos_token")
        if found is None:
            raise DataError(
                f"{self.path}: no eos_token in {' or '.join(_FILES)} beside it, so no token ends a document; "
                "name one there"
            )
        return found

    @property
    def pad_id(self) -> int:
        """What fills a row: padding, or EOS where there is none. Nothing learns from it."""
        found = self._special("pad_token")
        return self.eos_id if found is None else found

    @property
    def mask_id(self) -> int:
        """What hides a token, ``NO_TOKEN`` where there is none."""
        found = self._special("mask_token")
        return NO_TOKEN if found is None else found

    @property
    def special_ids(self) -> dict[str, int]:
        """``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, as far as there are such tokens."""
        ids = {f"{name}_token_id": self._special(f"{name}_token") for name in ("bos", "eos", "pad")}
        return {name: number for name, number in ids.items() if number is not None}

    @property
    def settings(self) -> dict[str, Any]:
        """What the files beside it decide: the ids of special tokens, and what begins a document."""
        return {"eos": self.eos_id, "pad": self.pad_id, "mask": self.mask_id, "prefix": self._prefix}

    @property
    def fingerprint(self) -> str:
        """sha256 of the file and the ``settings``: of all that the tokens of a document depend on."""
        return sha256_json([self.sha256, self.settings])

    def encode(self, text: str) -> np.ndarray:
        """Token ids of ``text``, int64 ``[tokens]``; ``DataError`` for what is not text."""
        check_text(text)
        return np.array([*self._prefix, *self._encode(text)], dtype=np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ``ids``; special tokens give nothing."""
        return self._tokenizer.decode(np.asarray(ids, dtype=np.int64).tolist(), skip_special_tokens=True)

    def _encode(self, text: str, *, whole: bool = False) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=whole).ids

    def _find_prefix(self) -> list[int]:
        """What is put before a text. ``add_bos_token`` decides where it is set, as in transformers."""
        says = self._files.get("add_bos_token")
        if says is not None:
            bos = self._special("bos_token")
            return [bos] if says and bos is not None else []
        plain, whole = self._encode("a"), self._encode("a", whole=True)
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start]
        raise DataError(
            f"{self.path}: puts special tokens inside a text, not before and after it; it cannot be used for shards"
        )

    def _read_files(self) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        for name in reversed(_FILES):
            file = self.path.with_name(name)
            if not file.is_file():
                continue
            try:
                found = json.loads(file.read_bytes())
            except ValueError as error:
                raise DataError(f"{file}: not JSON: {error}") from None
            if not isinstance(found, dict):
                raise DataError(f"{file}: not a JSON object")
            settings |= found
        return settings

    def _special(self, name: str) -> int | None:
        token = self._files.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        return self._tokenizer.token_to_id(text) if isinstance(text, str) else None


AnyTokenizer = Tokenizer | JsonTokenizer


def open_tokenizer(path: str | Path) -> AnyTokenizer:
    """One of ours, or of an imported model where the file holds JSON; ``DataError`` if it is neither."""
    return JsonTokenizer(path) if is_json(path) else Tokenizer(path)


def is_json(path: str | Path) -> bool:
    """Whether a file begins as JSON does. By content: the copy of a remote folder has no ending."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        return file.read(64).lstrip()[:1] == b"{"
