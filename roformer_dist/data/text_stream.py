"""Text from tokens as they come: never half a character, never half an escape."""

from __future__ import annotations

from roformer_dist.data.tokenizer import Tokenizer

# A character has at most four bytes, each a token of its own in the worst case; three of them may be there.
_INCOMPLETE = 3


class TextStream:
    """Decodes tokens one by one; what ``push`` and ``finish`` give, joined, is the decoding of all of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._waiting: list[int] = []
        self._given = 0

    def push(self, token: int) -> str:
        """The text that became certain with ``token``; may be empty."""
        self._waiting.append(token)
        text = self._tokenizer.decode(self._waiting)
        end = len(text)
        while end > max(self._given, len(text) - _INCOMPLETE) and text[end - 1] in "\ufffd\x1a":
            end -= 1
        certain = text[self._given : end]
        self._given = end
        if end == len(text):
            self._waiting, self._given = [], 0
        return certain

    def finish(self) -> str:
        """The rest, as it is."""
        rest = self._tokenizer.decode(self._waiting)[self._given :]
        self._waiting, self._given = [], 0
        return rest
