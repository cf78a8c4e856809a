import functools
import random
import re
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_tiny import VOCAB_SIZE, tiny, tiny_texts

from roformer_dist.data import tokenizer as tokenizer_module
from roformer_dist.data.errors import DataError
from roformer_dist.data.tokenizer import Tokenizer, escape, train_tokenizer, training_windows, unescape

# Not st.text: of an alphabet that is a union it draws all characters alike, so these hardly ever.
hard = st.lists(
    st.one_of(
        st.sampled_from("\x1a\u2581\u2585 \n\r\t\x00012ab<>/s"), st.characters(exclude_categories=["Cs"])
    ),
    max_size=60,
).map("".join)


def test_every_unicode_scalar_value_comes_back():
    tokenizer = tiny().tokenizer
    scalars = [chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
    for first in range(0, len(scalars), 50_000):
        text = "".join(scalars[first : first + 50_000])
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for character in "\x00\x1a\u2581\u2585\ufeff\ufffd\r\n\t ":
        text = f"{character}a{character} {character}{character}1"
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(hard)
@settings(deadline=None, max_examples=300)
def test_any_text_comes_back_and_escaping_hides_what_sentencepiece_cannot_carry(text):
    tokenizer = tiny().tokenizer
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert unescape(escape(text)) == text
    assert not set(escape(text)) & {"\u2581", "\u2585"}


def raw_of(tokenizer):
    """sentencepiece alone, given a text in one go."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    return lambda text: model.encode(escape(text))


@functools.cache
def crossing():
    """A tokenizer of a few letters without spaces, whose pieces overlap in every way."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "t.model"
    texts = ["".join(random.Random(i).choices("abc\u00e9\u4e00\u4e01", k=2000)) for i in range(20)]
    path.write_bytes(train_tokenizer(texts, 600))
    return folder, Tokenizer(path)


def test_every_kind_of_boundary_is_there():
    pairs = crossing()[1]._pairs
    assert "ab" in pairs
    assert "\u4e00\u4e01" in pairs
    assert not [pair for pair in pairs | tiny().tokenizer._pairs if "\n" in pair]
    # A space begins a piece, or is one of several, but never follows a letter in one.
    assert [pair for pair in tiny().tokenizer._pairs if pair[0] == " "]
    assert not [pair for pair in tiny().tokenizer._pairs if pair[0].isalpha() and pair[1] == " "]
    assert not [pair for pair in tiny().tokenizer._pairs if pair.isdigit()]


@given(hard, st.integers(1, 40))
@settings(deadline=None, max_examples=500)
def test_encoding_in_pieces_equals_encoding_in_one_go(text, size):
    tokenizer = tiny().tokenizer
    with mock.patch.object(tokenizer_module, "_CHUNK", size):
        assert "".join(tokenizer_module._chunks(text, tokenizer._pairs)) == text
        assert tokenizer.encode(text).tolist() == raw_of(tokenizer)(text)


@given(st.text("abc\u00e9\u4e00\u4e01\u4e02 1\n\x1a\u2581", max_size=200), st.integers(1, 5))
@settings(deadline=None, max_examples=500)
def test_text_of_overlapping_pieces_is_cut_only_where_nothing_merges(text, size):
    tokenizer = crossing()[1]
    with mock.patch.object(tokenizer_module, "_CHUNK", size):
        assert tokenizer.encode(text).tolist() == raw_of(tokenizer)(text)


def test_a_long_text_is_encoded_as_in_one_go():
    generator = random.Random(3)
    words = " ".join(tiny_texts().values()).split(" ")
    text = "".join(
        generator.choice(words) + generator.choice(["\n", " ", "\n\n", "  "]) for _ in range(20_000)
    )
    text += "x" * 5000 + "\n" * 3000 + " " * 3000 + "end"
    tokenizer = tiny().tokenizer
    for long in (text, text.replace("\n", " ")):
        assert tokenizer.encode(long).tolist() == raw_of(tokenizer)(long)
        # Without newlines too it is cut, wherever a word begins.
        lengths = list(map(len, tokenizer_module._chunks(escape(long), tokenizer._pairs)))
        assert sum(length > 1100 for length in lengths) <= 5
        assert len(lengths) > 50
    assert crossing()[1].encode("abc" * 5000).tolist() == raw_of(crossing()[1])("abc" * 5000)


def test_ids_and_types():
    tokenizer = tiny().tokenizer
    ids = (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id)
    assert ids == (0, 1, 2, 3, 4)
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.encode("a\nb").dtype == np.int64
    assert tokenizer.encode("\n").tolist() == [5]
    # Text that looks like a control piece stays text.
    assert tokenizer.encode("<s></s><mask>").min() > 5
    assert tokenizer.decode([1, *tokenizer.encode("the end"), 2, 3, 4]) == "the end"


def test_digits_are_single_tokens_and_blanks_are_not(tmp_path):
    path = tmp_path / "t.model"
    path.write_bytes(train_tokenizer(["        x = 1234 1234\n" * 200], 275))
    for tokenizer in (tiny().tokenizer, Tokenizer(path)):
        assert len(tokenizer.encode("1234567")) == 7
    assert len(Tokenizer(path).encode("        ")) < 4


def test_training_is_deterministic_and_sees_every_character():
    texts = list(tiny_texts().values())
    assert train_tokenizer(texts, VOCAB_SIZE) == tiny().tokenizer.path.read_bytes()
    windows = list(training_windows(texts))
    assert max(map(len, windows)) <= 1024
    assert "".join(windows) == "".join(escape(text).replace("\n", "") for text in texts)


def test_the_trainer_drops_nothing(capfd, monkeypatch):
    # What sentencepiece itself says it was given and kept; a document in one line would be dropped.
    monkeypatch.setattr(tokenizer_module, "_QUIET", 0)
    texts = ["\u2585 zebra" * 2000, "x" * 70_000, "caf\u00e9 \U0001f600\n\n" * 3000, *tiny_texts().values()]
    train_tokenizer(texts, VOCAB_SIZE)
    log = capfd.readouterr().err
    # It leaves U+0000, and a carriage return at the end of a line, to the byte pieces.
    characters = sum(len(re.sub("\r?\n|\0", "", escape(text))) for text in texts)
    assert re.search(rf"all chars count={characters}\b", log), log
    assert "Skipped" not in log
    assert "too long" not in log.lower()


def test_training_learns_from_lines_sentencepiece_would_drop(tmp_path):
    path = tmp_path / "t.model"
    path.write_bytes(train_tokenizer(["\u2585 zebra" * 2000, "x" * 70_000], 280))
    assert len(Tokenizer(path).encode(" zebra")) == 1


def test_what_is_wrong_with_a_file_is_said_in_its_own_words():
    def texts():
        yield "hello"
        raise DataError("b.txt: not UTF-8 at byte 0")

    with pytest.raises(DataError, match=r"^b\.txt: not UTF-8 at byte 0$"):
        train_tokenizer(texts(), 280)


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (["abc abc"], 100, "--vocab-size 100 is too small: 262 pieces are fixed .* at least 263"),
        (["abc abc"], 10**10, "--vocab-size 10000000000: .* at most 2147483647"),
        (["abc abc"], 8000, r"--vocab-size 8000 is more than this text supports; give at most \d+"),
        (["".join(map(chr, range(0x4E00, 0x5000)))], 300, r"too small for the characters .* at least \d+"),
        ([""], 300, "holds no text"),
    ],
)
def test_training_errors_are_one_line_with_numbers(texts, size, message):
    with pytest.raises(DataError, match=message) as caught:
        train_tokenizer(texts, size)
    assert "\n" not in str(caught.value)


def test_use_errors_are_one_line(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    with open(tmp_path / "other.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["other text"] * 9), model_writer=file, vocab_size=10, minloglevel=2
        )
    attempts = [
        (lambda: Tokenizer(tmp_path / "none.model"), "none.model: no such tokenizer"),
        (lambda: Tokenizer(tmp_path / "bad.model"), "bad.model: not a sentencepiece model"),
        (lambda: Tokenizer(tmp_path / "other.model"), "other.model: its first pieces are .* was not made by"),
        (lambda: tiny().tokenizer.encode("ab\ud800"), "character 2 is the lone surrogate U\\+D800"),
        (lambda: tiny().tokenizer.decode([7, VOCAB_SIZE]), f"token id {VOCAB_SIZE} is outside"),
    ]
    for attempt, message in attempts:
        with pytest.raises(DataError) as caught:
            attempt()
        assert re.search(message, str(caught.value))
        assert "\n" not in str(caught.value)
