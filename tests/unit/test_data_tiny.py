"""A tiny corpus, tokenizer, shards and plan, built once; the other test_data files use it."""

from __future__ import annotations

import functools
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

from roformer_dist.data.documents import TextOptions, read_texts
from roformer_dist.data.inputs import InputFile, find_inputs
from roformer_dist.data.packing import make_plan
from roformer_dist.data.plan import Plan
from roformer_dist.data.shards import write_shards
from roformer_dist.data.store import ShardStore
from roformer_dist.data.tokenizer import Tokenizer, train_tokenizer

VOCAB_SIZE = 400


@dataclass(frozen=True)
class Tiny:
    folder: tempfile.TemporaryDirectory  # removed when the process ends
    root: Path
    files: list[InputFile]
    tokenizer: Tokenizer
    store: ShardStore

    def plan(self, seq_len: int = 64) -> Plan:
        return make_plan(self.store, seq_len, seed=3)


def tiny_texts() -> dict[str, str]:
    """41 documents of 1 to about 1,700 characters, some with everything that is hard to keep."""
    generator = random.Random(5)
    stems = "the of and to in a that is was he".split()  # noqa: SIM905
    words = [stem + ending for stem in stems for ending in ("", "s", "ing", "ed")]
    texts = {
        f"d{i:02d}.txt": " ".join(generator.choice(words) for _ in range(i * 8)) + "\n" * (i % 3)
        for i in range(40)
    }
    texts["d00.txt"] = "a"
    run = "".join(generator.choices("abcdefghij", k=9000))  # longer than sentencepiece's longest line
    texts["odd/hard.txt"] = f"a\u2581b \u2585\x1a1\x1a \t\r\n\n  12345\u00e9\U0001f600\x00 {run}"
    return texts


@functools.cache
def tiny() -> Tiny:
    folder = tempfile.TemporaryDirectory(prefix="tiny-corpus-")
    root = Path(folder.name)
    for name, text in tiny_texts().items():
        path = root / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    files = find_inputs([str(root / "text")])
    (root / "tokenizer.model").write_bytes(train_tokenizer(read_texts(files, TextOptions()), VOCAB_SIZE))
    tokenizer = Tokenizer(root / "tokenizer.model")
    write_shards(files, tokenizer, root / "shards", shard_bytes=4096)
    return Tiny(folder, root, files, tokenizer, ShardStore(root / "shards"))


def test_the_tiny_corpus_exercises_several_shards_and_long_documents():
    assert len(tiny().store.manifest.shards) > 2
    assert tiny().store.lengths.max() > 5 * 64
    assert tiny().store.lengths.min() == 2
