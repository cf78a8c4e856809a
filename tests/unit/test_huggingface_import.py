"""Importing: the logits of transformers, for every family and kind of rotation, and the same weights back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exchanged import SCALINGS, TRAINED, load_ours, our_logits, some_tokens, their_logits, their_model
from safetensors.torch import load_file

from roformer_dist.exchange import export_hf, import_hf
from roformer_dist.interop.rope import read_rope

LLAMA: dict[str, Any] = {"num_key_value_heads": 2}
ROFORMER: dict[str, Any] = {"type_vocab_size": 2}
NEOX: dict[str, Any] = {"hidden_act": "gelu"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_biased_untied": (
        "LlamaForCausalLM",
        {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "head_dim": 16},
    ),
    **{
        f"llama_{kind}": (
            "LlamaForCausalLM",
            {**LLAMA, "rope_parameters": {**scaling, "rope_theta": 5000.0}, "tie_word_embeddings": True},
        )
        for kind, scaling in SCALINGS.items()
    },
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 16, "attention_bias": True}),
    "qwen3_yarn": (
        "Qwen3ForCausalLM",
        {**LLAMA, "head_dim": 8, "rope_parameters": {**SCALINGS["yarn"], "rope_theta": 1e6}},
    ),
    "neox_parallel": ("GPTNeoXForCausalLM", {**NEOX, "tie_word_embeddings": False}),
    "neox_sequential": (
        "GPTNeoXForCausalLM",
        {
            **NEOX,
            "use_parallel_residual": False,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.5},
        },
    ),
    "roformer_masked": ("RoFormerForMaskedLM", ROFORMER),
    "roformer_masked_untied": ("RoFormerForMaskedLM", {"tie_word_embeddings": False}),
    "roformer_masked_values": ("RoFormerForMaskedLM", {"rotary_value": True, "embedding_size": 24}),
    "roformer_causal": ("RoFormerForCausalLM", {"is_decoder": True, "embedding_size": 24}),
    "roformer_causal_untied": (
        "RoFormerForCausalLM",
        {"is_decoder": True, "rotary_value": True, "tie_word_embeddings": False},
    ),
    "roformer_classes": ("RoFormerForSequenceClassification", {"num_labels": 3}),
    "roformer_classes_values": (
        "RoFormerForSequenceClassification",
        {"num_labels": 5, "rotary_value": True, "embedding_size": 48},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_imported_model_computes_what_transformers_does_and_goes_back_bit_for_bit(
    case: str, tmp_path: Path
) -> None:
    architecture, values = CASES[case]
    theirs = their_model(architecture, **values)
    theirs.save_pretrained(tmp_path / "theirs")
    import_hf(str(tmp_path / "theirs"), tmp_path / "ours")
    network, objective = load_ours(tmp_path / "ours" / "checkpoints" / "step_000000")
    # Within and beyond the length where the rules that depend on it change; RoFormer's table ends there.
    for length in (13, TRAINED) if "roformer" in case else (13, TRAINED, 57):
        tokens = some_tokens(length)
        expected = their_logits(theirs, tokens)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(our_logits(network, objective, tokens), expected, rtol=0, atol=1e-5)

    export_hf(
        tmp_path / "ours",
        tmp_path / "back",
        max_position_embeddings=None,
        max_shard_size="20KB",
        dtype="float32",
        tokenizer=None,
    )
    first, second = ({}, {})
    for folder, tensors in (("theirs", first), ("back", second)):
        for file in sorted((tmp_path / folder).glob("*.safetensors")):
            tensors |= load_file(file)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if "embed_positions" in name:  # made anew, from the same float64 angles
            torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-7)
        elif name != "cls.predictions.bias" or values.get(
            "tie_word_embeddings", True
        ):  # else computes nothing
            assert torch.equal(second[name], tensor), name
    again = type(theirs).from_pretrained(tmp_path / "back").eval()
    torch.testing.assert_close(their_logits(again, tokens), expected, rtol=0, atol=1e-6)


def test_every_value_of_yarn_is_read() -> None:
    values = {
        "factor": 3.0,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "truncate": False,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
    }
    theirs = {"rope_type": "yarn", "rope_theta": 5e3, "original_max_position_embeddings": 16, **values}
    read = read_rope(theirs, trained=32, source="config.json")
    assert (read["theta"], read["scaling"]) == (5e3, {"kind": "yarn", "original_seq_len": 16, **values})

    # As there, one mscale alone counts for nothing.
    del theirs["mscale_all_dim"]
    assert "mscale" not in read_rope(theirs, trained=32, source="config.json")["scaling"]


@pytest.mark.parametrize("kind", ["yarn", "longrope"])
def test_a_factor_that_is_not_said_is_what_the_length_grew_by(kind: str) -> None:
    theirs = {**SCALINGS[kind], "rope_theta": 5e3, "original_max_position_embeddings": 16}
    del theirs["factor"]
    assert read_rope(theirs, trained=40, source="config.json")["scaling"]["factor"] == 2.5


def test_a_weight_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    their_model("LlamaForCausalLM").save_pretrained(folder)
    names = {"a": "model.safetensors", "b": "other.safetensors"}
    (folder / names["b"]).write_bytes((folder / names["a"]).read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match="is in another file too"):
        import_hf(str(folder), tmp_path / "ours")
