"""Our sentencepiece tokenizer as a ``tokenizer.json`` that gives the same ids and the same text back."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from roformer_dist.interop.huggingface import require_transformers
from roformer_dist.interop.settings import HuggingFaceError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
# Where an import keeps them, beside its checkpoints.
TOKENIZER_FOLDER = "tokenizer"
# What is escaped before sentencepiece sees a text, in this order, and undone in the opposite one
# (docs/data_format.md).
ESCAPES = (("\x1a", "\x1a0"), ("\u2581", "\x1a1"), ("\u2585", "\x1a2"))
_SPECIAL = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}


def convert_tokenizer(model_file: Path, out: Path, model_max_length: int) -> dict[str, int]:
    """Write ``tokenizer.json`` and its configuration for one of our ``.model`` files into ``out``.

    transformers reads pieces and merges; normaliser and decoder are ours, because sentencepiece's mark for a
    space, U+2581, can stand in a text. No BOS is added, as our data has none, and the names of special tokens in
    a text stay text.

    Returns:
        The ids of BOS, EOS and padding.

    Raises:
        HuggingFaceError: not a tokenizer made by ``data tokenizer``.
    """
    transformers = require_transformers()
    from tokenizers import decoders, normalizers

    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(model_file, Path(folder) / "tokenizer.model")
        try:
            read = transformers.LlamaTokenizer.from_pretrained(folder, add_prefix_space=False, legacy=False)
        except Exception as error:
            raise HuggingFaceError(
                f"{model_file}: not a sentencepiece model that transformers reads: {' '.join(str(error).split())}"
            ) from None
    backend = read.backend_tokenizer
    names = [backend.id_to_token(i) for i in range(6)]
    if names != ["<unk>", "<s>", "</s>", "<pad>", "<mask>", "\n"]:
        raise HuggingFaceError(
            f"{model_file}: its first pieces are {names}, so it was not made by 'roformer-dist data tokenizer'; "
            "copy that tokenizer's own Hugging Face files beside the model"
        )
    escapes = [normalizers.Replace(plain, escaped) for plain, escaped in ESCAPES]
    backend.normalizer = normalizers.Sequence([*escapes, normalizers.Replace(" ", "\u2581")])
    undo = [decoders.Replace(escaped, plain) for plain, escaped in reversed(ESCAPES)]
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *undo]
    )
    special: dict[str, Any] = dict(_SPECIAL)
    converted = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **special,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )
    converted.save_pretrained(out)
    shutil.copyfile(model_file, out / "tokenizer.model")
    return dict(_IDS)
