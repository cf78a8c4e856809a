"""A Llama of transformers goes on training here and is a Llama of transformers again."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import tomli_w
import torch
import transformers
from byte_level import make
from commands import CONFIG, SEQ_LEN, run, write_corpus
from safetensors.torch import load_file

from roformer_dist.data.documents import TextOptions, read_texts
from roformer_dist.data.inputs import find_inputs
from roformer_dist.data.json_tokenizer import open_tokenizer
from roformer_dist.data.packing import make_plan
from roformer_dist.data.shards import write_shards
from roformer_dist.data.store import ShardStore
from roformer_dist.data.tokenizer import train_tokenizer
from roformer_dist.engine.checkpoint import load_parameters
from roformer_dist.exchange import export_hf, import_hf


def prepare(folder: Path, tokenizer: Path) -> str:
    """The configuration of a run on data below ``folder`` in the tokens of ``tokenizer``, made in this process."""
    files = find_inputs([str(folder / "corpus/validation")])
    for split in ("train", "validation"):
        write_shards(files, open_tokenizer(tokenizer), folder / "shards" / split)
        make_plan(ShardStore(folder / "shards" / split), SEQ_LEN, seed=0).save(folder / f"{split}.npz")
    text = CONFIG.format(folder=folder, seq_len=SEQ_LEN)
    return text.replace(str(folder / "tokenizer.model"), str(tokenizer))


def llama(folder: Path, vocab_size: int, **token_ids: int) -> transformers.LlamaForCausalLM:
    """A small Llama with random weights, saved in ``folder``."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
            architectures=["LlamaForCausalLM"],
            **token_ids,
        )
    )
    model.save_pretrained(folder)
    return model


def train_on(folder: Path, config: str, num_steps: int) -> tuple[str, float]:
    """Train ``folder/imported`` with the frequencies of a longer context; what was said, and the learning rate."""
    # The imported sections, and the run's own.
    values = tomllib.loads(config)
    values |= tomllib.loads((folder / "imported/model.toml").read_text())
    values["model"]["rope"]["scaling"] = {"kind": "yarn", "factor": 2.0, "original_seq_len": 32}
    values["parallel"] = {"sp_size": 1, "zero_stage": 1}
    values["train"] |= {"num_steps": num_steps}
    values["schedule"]["warmup_steps"] = 0
    values["validation"]["every_steps"] = num_steps
    values["checkpoint"] = {"every_steps": num_steps, "init_from": str(folder / "imported")}
    file = folder / "config.toml"
    file.write_text(tomli_w.dumps(values))
    run_dir = str(folder / "run")
    said = run("launch", "local", "--config", str(file), "--run-dir", run_dir, "--processes", "1")
    return said, values["optimizer"]["lr"]


def export(folder: Path) -> transformers.LlamaForCausalLM:
    """The run in ``folder`` as transformers reads it."""
    export_hf(
        folder / "run",
        folder / "exported",
        max_position_embeddings=None,
        max_shard_size="5GB",
        dtype="float32",
        tokenizer=None,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "exported")


def test_an_imported_model_trains_on_and_is_exported_with_its_data_s_tokenizer(tmp_path: Path) -> None:
    theirs = llama(tmp_path / "theirs", 512)
    import_hf(str(tmp_path / "theirs"), tmp_path / "imported")
    start = load_parameters(tmp_path / "imported/checkpoints/step_000000")
    embedding = theirs.get_input_embeddings().weight
    assert torch.equal(start["embedding.weight"], embedding)

    write_corpus(tmp_path / "corpus")
    files = find_inputs([str(tmp_path / "corpus/validation")])
    model = tmp_path / "tokenizer.model"
    model.write_bytes(train_tokenizer(read_texts(files, TextOptions()), 512))
    said, rate = train_on(tmp_path, prepare(tmp_path, model), 3)
    assert "parameters from" in said
    assert "model.rope.scaling" in said

    exported = export(tmp_path)
    assert exported.config.max_position_embeddings == SEQ_LEN
    assert exported.config.rope_parameters["rope_type"] == "yarn"
    # Three steps of at most the peak learning rate from where it started, and not from random weights.
    moved = (exported.get_input_embeddings().weight - embedding).abs().max()
    assert 0 < moved <= 4 * rate
    trained = load_parameters(tmp_path / "run/checkpoints/step_000003")
    assert torch.equal(
        load_file(tmp_path / "exported/model.safetensors")["model.norm.weight"], trained["final_norm.weight"]
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert tokenizer.decode(tokenizer.encode("a  line\n")) == "a  line\n"


def test_an_imported_model_trains_on_in_its_own_tokens(tmp_path: Path) -> None:
    make(tmp_path / "theirs")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    llama(
        tmp_path / "theirs", len(theirs), bos_token_id=theirs.bos_token_id, eos_token_id=theirs.eos_token_id
    )
    import_hf(str(tmp_path / "theirs"), tmp_path / "imported")

    write_corpus(tmp_path / "corpus")
    train_on(tmp_path, prepare(tmp_path, tmp_path / "imported/tokenizer/tokenizer.json"), 1)
    with ShardStore(tmp_path / "shards/train") as store:
        document = store.read(0)
        assert (document[0], document[-1]) == (theirs.bos_token_id, theirs.eos_token_id)
    shown = run("data", "inspect", str(tmp_path / "shards/train"), "--document", "0", "--json")
    text = theirs.decode(document.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert json.loads(shown)["text"] == text

    exported = export(tmp_path)
    assert exported.config.eos_token_id == theirs.eos_token_id
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert again.encode(text) == theirs.encode(text)
    # The run, in its own tokens, continues a text as transformers continues it from the export.
    prompt = "The statement"
    asked = ["generate", "--checkpoint", str(tmp_path / "run"), "--prompt", prompt, "--max-new-tokens", "6"]
    ours = json.loads(run(*asked, "--json"))["tokens"]
    ids = torch.tensor([again.encode(prompt)])
    with torch.no_grad():
        expected = exported.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert ours == expected[0, ids.shape[1] :].tolist()
