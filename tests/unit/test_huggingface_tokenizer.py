"""An exported tokenizer gives our ids and our text; an exported model goes on as ours would."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from exchanged import our_logits, our_model, save_ours
from hypothesis import given, settings
from test_data_tiny import VOCAB_SIZE, tiny
from test_data_tokenizer import hard

from roformer_dist.data.tokenizer import Tokenizer
from roformer_dist.exchange import export_hf, import_hf
from roformer_dist.generate import run_generate
from roformer_dist.interop.text import ImportedStream, ImportedTokenizer
from roformer_dist.interop.tokenizer import convert_tokenizer
from roformer_dist.model.sampling import Sampling

TEXTS = [
    "",
    " ",
    "the of and to",
    " leading and trailing ",
    "two  three   many          spaces",
    "\n\n\nlines\n and\r\nreturns\n",
    "\ttabs\t\tand \t mixes",
    "a\u2581b \u2581\u2581 \u2585 \x1a0 \x1a1 \x1a2 \x1a",
    "\u00e9\u4e2d\u6587 \U0001f600\U0001f468\u200d\U0001f469 \u00a0 \u0000 never seen",
    "<s> </s> <unk> <pad> <mask> <0x41>",
    "12345 3.14 0x1F",
    "a , b . c ! d ? it 's do n't we 've",
    "def f(x):\n    return {'a': [x, -1]}  # comment\n",
    "n\u0303 \ufb01 \uff21 ti\u1ebfng",
]


@functools.cache
def exported() -> tuple[Tokenizer, Any]:
    """Ours, and what AutoTokenizer makes of its export."""
    with tempfile.TemporaryDirectory() as folder:
        convert_tokenizer(tiny().tokenizer.path, Path(folder), 128)
        return tiny().tokenizer, transformers.AutoTokenizer.from_pretrained(folder)


def check(text: str) -> None:
    ours, theirs = exported()
    ids = ours.encode(text).tolist()
    assert theirs.encode(text) == ids
    assert theirs.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_ours(text: str) -> None:
    check(text)


@settings(max_examples=300, deadline=None)
@given(hard)
def test_any_text_has_our_ids_and_comes_back(text: str) -> None:
    check(text)


def test_what_a_document_and_a_special_token_are_is_known_there() -> None:
    ours, theirs = exported()
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    assert (theirs.pad_token_id, theirs.mask_token_id) == (ours.pad_id, ours.mask_id)
    assert (len(theirs), theirs.model_max_length) == (ours.vocab_size, 128)
    assert theirs.decode([1, *ours.encode("the"), 2], skip_special_tokens=True) == "the"


def test_an_exported_model_and_its_tokenizer_go_on_with_our_tokens(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 40, "num_kv_heads": 2}
    network, objective = our_model({**sizes, "vocab_size": VOCAB_SIZE}, {"kind": "causal"})
    save_ours(network, objective, tmp_path / "run")
    export_hf(
        tmp_path / "run",
        tmp_path / "theirs",
        max_position_embeddings=None,
        max_shard_size="5GB",
        dtype="float32",
        tokenizer=tiny().tokenizer.path,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "tokenizer.model").read_bytes() == tiny().tokenizer.path.read_bytes()
    assert model.config.eos_token_id == tokenizer.eos_token_id == 2
    prompt = tokenizer("the of and\n", return_tensors="pt")
    with_cache = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0].tolist()
    ours = tiny().tokenizer.encode("the of and\n").tolist()
    for _ in range(24):
        if ours[-1] == tiny().tokenizer.eos_id:
            break
        ours.append(int(our_logits(network, objective, torch.tensor([ours]))[0, -1].argmax()))
    assert with_cache == ours
    # And an import of it, parameters and tokenizer without any training, goes on with the same.
    import_hf(str(tmp_path / "theirs"), tmp_path / "back")
    shown: list[str] = []
    result = run_generate(
        tmp_path / "back",
        "the of and\n",
        max_new_tokens=24,
        sampling=Sampling(),
        stop_at_eos=True,
        prefill_chunk=None,
        refill=True,
        overrides=['model.rope.scaling={kind="linear",factor=1.0}'],
        show=shown.append,
    )
    assert result is not None
    new = ours[result["prompt_tokens"] :]
    assert result["tokens"] == new
    assert result["text"] == "".join(shown)


def byte_level(folder: Path) -> ImportedTokenizer:
    """As GPT-NeoX's and Llama 3's: every byte is a token, spaces belong to words, BOS comes before a text."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat and the hat"] * 9, trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return ImportedTokenizer(folder)


def test_text_of_an_imported_tokenizer_comes_piece_by_piece_and_whole(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    prompt = tokenizer.encode("the cat")
    assert prompt[0] == 0  # begins a text
    assert prompt[-1] != 1  # and does not end it
    text = " and \U0001f600 the  hat\n\u4e2d caf\u00e9 "
    ids = tokenizer.encode(text)[1:]
    stream = ImportedStream(tokenizer, prompt)
    pieces = [stream.push(token) for token in [*ids, 1]]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    # Half a character at the end is shown as what it is.
    half = ImportedStream(tokenizer, prompt)
    assert (
        "".join(half.push(token) for token in ids[: ids.index(tokenizer.encode("\U0001f600")[1]) + 1])
        == " and "
    )
    assert "\ufffd" in half.finish()
    with pytest.raises(ValueError, match="not a tokenizer that transformers reads"):
        ImportedTokenizer(tmp_path / "nowhere")


def test_a_first_word_keeps_the_space_that_its_tokenizer_takes_from_the_start_of_a_text(
    tmp_path: Path,
) -> None:
    words = {"\u2581the": 0, "\u2581cat": 1, "\u2581hat": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="\u2581the"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    tokenizer = ImportedTokenizer(tmp_path)
    assert tokenizer.decode([2]) == "hat"
    stream = ImportedStream(tokenizer, tokenizer.encode("the cat"))
    assert [stream.push(2), stream.push(0), stream.finish()] == [" hat", " the", ""]


def test_a_tokenizer_of_others_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    other.write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a sentencepiece model") as caught:
        convert_tokenizer(other, tmp_path / "out", 128)
    assert "\n" not in str(caught.value)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat and the hat"] * 9),
        model_prefix=str(tmp_path / "plain"),
        model_type="bpe",
        vocab_size=20,
        minloglevel=2,
    )
    with pytest.raises(
        ValueError, match=r"its first pieces are .*not made by 'roformer-dist data tokenizer'"
    ):
        convert_tokenizer(tmp_path / "plain.model", tmp_path / "out", 128)


SIZES: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 40}


def exported_model(folder: Path, vocab_size: int = VOCAB_SIZE, tokenizer: Path | None = None) -> Path:
    """A causal model with our tokenizer, for transformers."""
    network, objective = our_model({**SIZES, "vocab_size": vocab_size}, {"kind": "causal"})
    save_ours(network, objective, folder / "run")
    export_hf(
        folder / "run",
        folder / "theirs",
        max_position_embeddings=None,
        max_shard_size="5GB",
        dtype="float32",
        tokenizer=tokenizer or tiny().tokenizer.path,
    )
    return folder / "theirs"


def our_tokens(imported: Path) -> list[int]:
    result = run_generate(
        imported,
        "the of",
        max_new_tokens=16,
        sampling=Sampling(),
        stop_at_eos=True,
        prefill_chunk=None,
        refill=True,
        overrides=[],
        show=lambda text: None,
    )
    assert result is not None
    return result["tokens"]


def their_tokens(folder: Path) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = transformers.AutoTokenizer.from_pretrained(folder)("the of", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0].tolist()
    return tokens[prompt["input_ids"].shape[1] :]


@pytest.mark.parametrize("ends", ["config", "one", "several", "none", "null"])
def test_an_import_ends_where_transformers_would(ends: str, tmp_path: Path) -> None:
    """``generate`` goes by generation_config.json alone, if there is one; the export of the import likewise."""
    folder = exported_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    free = their_tokens(folder)
    first, second = free[0], free[2]
    assert second not in free[:2]
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": first}))
    generation = {
        "one": {"eos_token_id": second},
        "several": {"eos_token_id": [VOCAB_SIZE - 1, second]},
        "none": {},
        "null": {"eos_token_id": None},
    }
    if ends in generation:
        (folder / "generation_config.json").write_text(json.dumps(generation[ends]))
    expected = free[: {"config": 1, "one": 3, "several": 3}.get(ends, 16)]
    assert their_tokens(folder) == expected
    import_hf(str(folder), tmp_path / "ours")
    assert our_tokens(tmp_path / "ours") == expected
    export_hf(
        tmp_path / "ours",
        tmp_path / "back",
        max_position_embeddings=None,
        max_shard_size="5GB",
        dtype="float32",
        tokenizer=None,
    )
    assert their_tokens(tmp_path / "back") == expected


def test_a_tokenizer_with_more_tokens_than_the_model_has_is_refused(tmp_path: Path) -> None:
    named = rf"--tokenizer .*: has {VOCAB_SIZE} tokens, model.vocab_size = {VOCAB_SIZE - 1}"
    with pytest.raises(ValueError, match=named) as caught:
        exported_model(tmp_path, VOCAB_SIZE - 1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "theirs").exists()
    # The files of one of Hugging Face's likewise; and a folder without any.
    files = exported_model(tmp_path / "fits")
    with pytest.raises(ValueError, match=named):
        exported_model(tmp_path / "folder", VOCAB_SIZE - 1, files)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--tokenizer .*empty: none of tokenizer\.json, .* is in it"):
        exported_model(tmp_path / "other", VOCAB_SIZE, tmp_path / "empty")
