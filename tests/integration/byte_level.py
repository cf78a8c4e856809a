"""A small tokenizer of Hugging Face's kind, as an imported model brings it."""

from __future__ import annotations

from pathlib import Path

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXTS = [
    "The House met, and the Speaker called it to order.\n\n\tHow are  you?   ",
    "naïve café — 北京 \U0001f600 <|end|> is a name, not an end\n",
    "x",
    "",
]


def make(folder: Path, *, bos: bool = True, **settings) -> Path:
    """A byte-level BPE tokenizer as Llama 3 has, with its files as transformers writes them."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(TEXTS * 3, trainer)
    if bos:
        trained.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", trained.token_to_id("<|begin|>"))]
        )
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>"} | settings
    transformers.PreTrainedTokenizerFast(tokenizer_object=trained, **names).save_pretrained(folder)
    return folder / "tokenizer.json"
