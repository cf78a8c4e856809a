"""A lossless sentencepiece tokenizer: training, encoding, decoding.

sentencepiece writes a space as U+2581 and gives it back as a space, so U+2581 in a text would be lost,
and its trainer drops every line with U+2585. Both are escaped here, before sentencepiece sees the text:

    U+001A -> U+001A "0"      U+2581 -> U+001A "1"      U+2585 -> U+001A "2"

Every U+001A of an escaped text is followed by its digit, so undoing the replacements one after the
other, U+001A "0" last, is exact. ``docs/data_format.md`` has the same rule for Hugging Face.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from roformer_dist.data.errors import DataError

UNK_ID, BOS_ID, EOS_ID, PAD_ID, MASK_ID = range(5)
_SPACE = "\u2581"  # sentencepiece's, in its pieces
_ESCAPES = (("\x1a", "\x1a0"), ("\u2581", "\x1a1"), ("\u2585", "\x1a2"))
_SPECIAL = 5 + 1 + 256  # unk bos eos pad mask, the newline, one piece for each byte
# Below sentencepiece's 4,192-byte limit on a training line at 4 bytes for each character; a longer
# line would be dropped, and a run of more than 65,535 symbols would abort the trainer.
_WINDOW = 1024
# The fastest of 512, 1,024, 4,096 and 16,384 on prose, and within 5 % of the fastest on one text of 2 MB.
_CHUNK = 1024
# Written into the model file, so a constant: the same text gives the same file on any machine.
_TRAINING_THREADS = 4
_QUIET = 2  # sentencepiece's level of messages: errors alone


def escape(text: str) -> str:
    """``text`` without U+2581 and U+2585; ``unescape`` gives it back exactly."""
    for plain, escaped in _ESCAPES:
        if plain in text:
            text = text.replace(plain, escaped)
    return text


def unescape(text: str) -> str:
    """The inverse of ``escape``."""
    if "\x1a" in text:
        for plain, escaped in reversed(_ESCAPES):
            text = text.replace(escaped, plain)
    return text


def check_text(text: str) -> None:
    """``DataError`` for a lone surrogate, which UTF-8 cannot carry."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}, "
            "which is not text; remove it"
        ) from None


class Tokenizer:
    """A trained tokenizer file. Encoding and then decoding gives any text back.

    Args:
        path: the ``.model`` file that ``train_tokenizer`` wrote.

    Raises:
        DataError: the file is missing, not a sentencepiece model, or not a lossless one of ours.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{path}: no such tokenizer; train it with: roformer-dist data tokenizer")
        model = self.path.read_bytes()
        self.sha256 = self.fingerprint = hashlib.sha256(model).hexdigest()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise DataError(
                f"{path}: not a sentencepiece model; train one: roformer-dist data tokenizer"
            ) from None
        names = [self._model.id_to_piece(i) for i in range(min(6, self._model.vocab_size()))]
        if names != ["<unk>", "<s>", "</s>", "<pad>", "<mask>", "\n"]:
            raise DataError(
                f"{path}: its first pieces are {names}, so it was not made by 'roformer-dist data tokenizer' "
                "and would not give text back exactly; train one"
            )
        self.vocab_size: int = self._model.vocab_size()
        self.unk_id, self.bos_id, self.eos_id, self.pad_id, self.mask_id = range(5)
        self.newline_id = 5

    def encode(self, text: str) -> np.ndarray:
        """Token ids of ``text``, int64 ``[tokens]``, without BOS or EOS.

        Raises:
            DataError: the text holds a lone surrogate, which UTF-8 cannot carry.
        """
        check_text(text)
        text = escape(text)
        # sentencepiece's time grows faster than the length of what it is given. One by one: it starts
        # threads for a list, however short.
        chunks = [text] if len(text) <= _CHUNK else _chunks(text, self._pairs)
        encoded = [self._model.encode(chunk) for chunk in chunks]
        return np.fromiter(itertools.chain.from_iterable(encoded), np.int64, sum(map(len, encoded)))

    @cached_property
    def _pairs(self) -> frozenset[str]:
        """Every two characters that stand next to each other in a piece, a space as a space."""
        # The names of bytes, such as <0x41>, are never merged from text.
        pieces = [self._model.id_to_piece(i) for i in range(self.vocab_size) if not self._model.is_byte(i)]
        return frozenset(a + b for piece in pieces for a, b in itertools.pairwise(piece.replace(_SPACE, " ")))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ``ids``; control pieces (BOS, EOS, padding, mask) give nothing.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            bad = array[(array < 0) | (array >= self.vocab_size)][0]
            raise DataError(
                f"token id {bad} is outside the vocabulary of {self.vocab_size}; use its own tokenizer"
            )
        return unescape(self._model.decode(array.tolist()))


def _chunks(text: str, pairs: frozenset[str]) -> Iterator[str]:
    """``text``, escaped, in pieces of about 1,024 characters that encode independently.

    A merge of byte-pair encoding joins two neighbours into a piece of the vocabulary, which then holds the
    characters on both sides of where they meet. Where no piece holds these two, nothing is ever merged
    across, and what is merged on one side, best score first and the leftmost of equals, does not
    depend on the other. There is such a place at every newline, in front of almost every word, and between digits.
    """
    start = 0
    while len(text) - start > _CHUNK:
        end = start + _CHUNK
        while end < len(text) and text[end - 1 : end + 1] in pairs:
            end += 1
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def training_windows(texts: Iterable[str]) -> Iterator[str]:
    """Every line of ``texts``, escaped and cut before a space into at most 1,024 characters."""
    for text in texts:
        for line in escape(text).split("\n"):
            start = 0
            while len(line) - start > _WINDOW:
                space = line.rfind(" ", start + 1, start + _WINDOW)
                end = space if space > 0 else start + _WINDOW
                yield line[start:end]
                start = end
            if start < len(line):
                yield line[start:]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a byte-pair tokenizer on ``texts`` and return the bytes of its model file.

    The same texts and size always give the same bytes. Ids: unk 0, bos 1, eos 2, pad 3, mask 4,
    newline 5, the 256 bytes 6 to 261, then what was learned.

    Raises:
        DataError: ``vocab_size`` is below 263, or larger or smaller than the text allows.
    """
    if vocab_size <= _SPECIAL:
        raise DataError(
            f"--vocab-size {vocab_size} is too small: {_SPECIAL} pieces are fixed (bytes and controls); "
            f"give at least {_SPECIAL + 1}"
        )
    if vocab_size >= 2**31:
        raise DataError(
            f"--vocab-size {vocab_size}: sentencepiece counts in 32 bits; give at most {2**31 - 1}"
        )
    model = io.BytesIO()
    failure: list[Exception] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_windows(_remember(texts, failure)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            control_symbols=["<mask>"],
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            character_coverage=0.99995,
            num_threads=_TRAINING_THREADS,
            minloglevel=_QUIET,
        )
    except RuntimeError as error:
        raise (failure[0] if failure else _training_error(str(error), vocab_size)) from None
    return model.getvalue()


def _remember(texts: Iterable[str], failure: list[Exception]) -> Iterator[str]:
    """``texts``; what they raise goes into ``failure`` too, since sentencepiece wraps it in words of its own."""
    try:
        yield from texts
    except (ValueError, OSError) as error:
        failure.append(error)
        raise


def _training_error(message: str, vocab_size: int) -> DataError:
    if limit := re.search(r"too high.*<= (\d+)", message):
        return DataError(
            f"--vocab-size {vocab_size} is more than this text supports; "
            f"give at most {limit[1]}, or more text"
        )
    if need := re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message):
        return DataError(
            f"--vocab-size {vocab_size} is too small for the characters of this text; give at least {need[2]}"
        )
    if "!sentences_.empty()" in message:
        return DataError("the input holds no text to train a tokenizer on; give files that are not empty")
    return DataError(f"sentencepiece could not train the tokenizer: {' '.join(message.split())}")
