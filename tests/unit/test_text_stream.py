"""Streaming gives the text of all tokens, and never a part of a character."""

from __future__ import annotations

import pytest

from roformer_dist.data.text_stream import TextStream
from roformer_dist.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    path.write_bytes(train_tokenizer(["the cat sat on the mat, the cat ran"] * 20, 285))
    return Tokenizer(path)


@pytest.mark.parametrize(
    "text",
    [
        "the cat sat",
        "  two  spaces, and\nlines\n",
        "bytes: \u4f60\u597d \U0001f600\u00e9!",
        "marks \u2581 and \u2585, \x1a and \x1a0",
        "a real \ufffd, \ufffd\ufffd\ufffd\ufffd\ufffd and at the end \ufffd",
    ],
)
def test_pieces_join_to_the_text(tokenizer: Tokenizer, text: str):
    stream = TextStream(tokenizer)
    ids = tokenizer.encode(text).tolist()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        # As soon as it can be: a character that is whole is given with its last token.
        assert "".join(pieces) == text


def test_bytes_that_are_no_text_come_out_too(tokenizer: Tokenizer):
    # Lead bytes without their rest, then a continuation byte: as decoded at once, and given while it goes on.
    ids = (
        [6 + byte for byte in [0xE4] * 6 + [0x80, 0xE4, 0xBD]] + tokenizer.encode("cat").tolist() + [6 + 0xF0]
    )
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces[:6])
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)
