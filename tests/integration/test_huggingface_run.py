"""A Llama of transformers goes on training here and is a Llama of transformers again."""

from __future__ import annotations

import tomllib
from pathlib import Path

import tomli_w
import torch
import transformers
from commands import CONFIG, SEQ_LEN, run, write_corpus
from safetensors.torch import load_file

from roformer_dist.data.documents import TextOptions, read_texts
from roformer_dist.data.inputs import find_inputs
from roformer_dist.data.packing import make_plan
from roformer_dist.data.shards import write_shards
from roformer_dist.data.store import ShardStore
from roformer_dist.data.tokenizer import Tokenizer, train_tokenizer
from roformer_dist.engine.checkpoint import load_parameters
from roformer_dist.exchange import export_hf, import_hf


def prepare(folder: Path) -> str:
    """The configuration of a run on data below ``folder``, made in this process."""
    write_corpus(folder / "corpus")
    files = find_inputs([str(folder / "corpus/validation")])
    (folder / "tokenizer.model").write_bytes(train_tokenizer(read_texts(files, TextOptions()), 512))
    for split in ("train", "validation"):
        write_shards(files, Tokenizer(folder / "tokenizer.model"), folder / "shards" / split)
        make_plan(ShardStore(folder / "shards" / split), SEQ_LEN, seed=0).save(folder / f"{split}.npz")
    return CONFIG.format(folder=folder, seq_len=SEQ_LEN)


def test_an_imported_model_trains_on_and_is_exported_with_its_data_s_tokenizer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=512,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
            architectures=["LlamaForCausalLM"],
        )
    )
    theirs.save_pretrained(tmp_path / "theirs")
    import_hf(str(tmp_path / "theirs"), tmp_path / "imported")
    start = load_parameters(tmp_path / "imported/checkpoints/step_000000")
    embedding = theirs.get_input_embeddings().weight
    assert torch.equal(start["embedding.weight"], embedding)

    # The imported sections, the frequencies of a longer context, and the run's own.
    values = tomllib.loads(prepare(tmp_path))
    values |= tomllib.loads((tmp_path / "imported/model.toml").read_text())
    values["model"]["rope"]["scaling"] = {"kind": "yarn", "factor": 2.0, "original_seq_len": 32}
    values["parallel"] = {"sp_size": 1, "zero_stage": 1}
    values["train"] |= {"num_steps": 3}
    values["schedule"]["warmup_steps"] = 0
    values["validation"]["every_steps"] = 3
    values["checkpoint"] = {"every_steps": 3, "init_from": str(tmp_path / "imported")}
    config = tmp_path / "config.toml"
    config.write_text(tomli_w.dumps(values))
    said = run(
        "launch", "local", "--config", str(config), "--run-dir", str(tmp_path / "run"), "--processes", "1"
    )
    assert "parameters from" in said
    assert "model.rope.scaling" in said

    export_hf(
        tmp_path / "run",
        tmp_path / "exported",
        max_position_embeddings=None,
        max_shard_size="5GB",
        dtype="float32",
        tokenizer=None,
    )
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert exported.config.max_position_embeddings == SEQ_LEN
    assert exported.config.rope_parameters["rope_type"] == "yarn"
    # Three steps of at most the peak learning rate from where it started, and not from random weights.
    moved = (exported.get_input_embeddings().weight - embedding).abs().max()
    assert 0 < moved <= 4 * values["optimizer"]["lr"]
    trained = load_parameters(tmp_path / "run/checkpoints/step_000003")
    assert torch.equal(
        load_file(tmp_path / "exported/model.safetensors")["model.norm.weight"], trained["final_norm.weight"]
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert tokenizer.decode(tokenizer.encode("a  line\n")) == "a  line\n"
