"""Exporting: transformers computes our logits, for every family and kind of rotation; what none has is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exchanged import (
    TRAINED,
    VOCAB,
    load_ours,
    our_logits,
    our_model,
    save_ours,
    some_tokens,
    their_logits,
)

from roformer_dist.exchange import export_hf, import_hf

SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 40}
ENCODER: dict[str, Any] = {"block": "post_norm", "norm": "layer_norm", "mlp": "gelu", "bias": True}
NEOX: dict[str, Any] = {**ENCODER, "block": "parallel", "tie_embeddings": False}
CAUSAL: dict[str, Any] = {"kind": "causal"}
MASKED: dict[str, Any] = {"kind": "masked"}
CLASSES: dict[str, Any] = {"kind": "classification", "num_labels": 3}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_seq_len": 16}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "factor": 3.0},
    "ntk": {"kind": "ntk", "factor": 3.0},
    "dynamic": {"kind": "dynamic", "factor": 2.0, "original_seq_len": TRAINED},
    "yarn": {"kind": "yarn", "factor": 4.0, "original_seq_len": 8},
    "yarn_mscale": {
        "kind": "yarn",
        "factor": 4.0,
        "original_seq_len": 8,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    },
    "longrope": {
        "kind": "longrope",
        "original_seq_len": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 1.5, 2.5, 4.0],
        "attention_factor": 1.2,
    },
    "llama3": LLAMA3,
}
# Ours (model, objective), and the class that it becomes.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "llama": ({"num_kv_heads": 2}, CAUSAL, "Llama"),
    "llama_half": ({"num_kv_heads": 1, "head_dim": 16, "rope": {"pairing": "half"}}, CAUSAL, "Llama"),
    **{
        f"llama_{kind}": ({"num_kv_heads": 2, "rope": {"scaling": scaling}}, CAUSAL, "Llama")
        for kind, scaling in SCALINGS.items()
    },
    "llama_biased": ({"bias": True, "tie_embeddings": False}, CAUSAL, "Llama"),
    "qwen3": ({"qk_norm": True, "num_kv_heads": 2, "head_dim": 12}, CAUSAL, "Qwen3"),
    "qwen3_yarn": ({"qk_norm": True, "rope": {"scaling": SCALINGS["yarn"]}}, CAUSAL, "Qwen3"),
    "qwen2": ({"attention_bias": "qkv"}, CAUSAL, "Qwen2"),
    "neox": ({**NEOX, "rope": {"partial": 0.5}}, CAUSAL, "GPTNeoX"),
    "neox_half": ({**NEOX, "rope": {"partial": 0.25, "pairing": "half"}}, CAUSAL, "GPTNeoX"),
    "neox_sequential": ({**NEOX, "block": "pre_norm", "attention_bias": "none"}, CAUSAL, "GPTNeoX"),
    "roformer": ({**ENCODER, "type_vocab_size": 2}, MASKED, "RoFormer"),
    "roformer_untied": ({**ENCODER, "embedding_size": 24, "tie_embeddings": False}, MASKED, "RoFormer"),
    "roformer_half": ({**ENCODER, "rope": {"pairing": "half", "theta": 300.0}}, MASKED, "RoFormer"),
    "roformer_values": ({**ENCODER, "rope": {"rotary_value": True}}, CLASSES, "RoFormer"),
    "roformer_causal": ({**ENCODER, "head_transform": True, "embedding_size": 24}, CAUSAL, "RoFormer"),
    **{
        f"roformer_{kind}": (
            {**ENCODER, "rope": {"theta": 3e3, "scaling": SCALINGS[kind]}},
            MASKED,
            "RoFormer",
        )
        for kind in ("linear", "ntk", "yarn", "llama3")
    },
}
HEADS = {"causal": "ForCausalLM", "masked": "ForMaskedLM", "classification": "ForSequenceClassification"}


def export(source: Path, out: Path, **options: Any) -> list[str]:
    defaults: dict[str, Any] = {
        "max_position_embeddings": None,
        "max_shard_size": "15KB",
        "dtype": "float32",
        "tokenizer": None,
    }
    return export_hf(source, out, **{**defaults, **options})


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_what_the_exported_model_does_and_it_comes_back(
    case: str, tmp_path: Path
) -> None:
    model, objective, family = CASES[case]
    network, wanted = our_model({**SIZES, **model}, objective)
    save_ours(network, wanted, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "theirs")
    auto = {
        "ForCausalLM": transformers.AutoModelForCausalLM,
        "ForMaskedLM": transformers.AutoModelForMaskedLM,
        "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
    }[HEADS[objective["kind"]]]
    theirs, report = auto.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert type(theirs).__name__ == family + HEADS[objective["kind"]]
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # More than one file, and their index.
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    lengths = (13, TRAINED) if family == "RoFormer" else (13, TRAINED, 57)
    for length in lengths:
        tokens = some_tokens(length)
        expected = our_logits(network, wanted, tokens)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(their_logits(theirs.eval(), tokens), expected, rtol=0, atol=1e-5)

    import_hf(str(tmp_path / "theirs"), tmp_path / "again")
    again, same = load_ours(tmp_path / "again" / "checkpoints" / "step_000000")
    assert same == wanted
    torch.testing.assert_close(our_logits(again, same, tokens), expected, rtol=0, atol=1e-5)
    if network.config.rope.pairing == again.config.rope.pairing:
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter, again.get_parameter(name)), name


def test_the_table_of_a_roformer_is_as_long_as_asked_for(tmp_path: Path) -> None:
    network, wanted = our_model({**SIZES, **ENCODER}, MASKED)
    save_ours(network, wanted, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "theirs", max_position_embeddings=300)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "theirs").eval()
    tokens = some_tokens(300)
    torch.testing.assert_close(
        their_logits(theirs, tokens), our_logits(network, wanted, tokens), rtol=0, atol=1e-5
    )


def test_a_model_is_written_in_the_precision_asked_for(tmp_path: Path) -> None:
    network, wanted = our_model(SIZES, CAUSAL)
    save_ours(network, wanted, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "theirs", dtype="bfloat16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    rounded = network.embedding.weight.to(torch.bfloat16)
    assert torch.equal(theirs.get_input_embeddings().weight, rounded)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "layers": ({"layers": ["full", "no_position"]}, CAUSAL, "layers"),
    "sliding": ({"layers": ["sliding"], "sliding_window": 4}, CAUSAL, "layers"),
    "linear": ({"layers": ["linear"]}, CAUSAL, "layers"),
    "position": ({"position": {"kind": "alibi"}}, CAUSAL, "position"),
    "policy": ({"rope": {"policy": {"kind": "rerope", "window": 8}}}, CAUSAL, "rope.policy"),
    "length": ({**ENCODER, "rope": {"scaling": SCALINGS["dynamic"]}}, MASKED, "dynamic"),
    "values": ({"rope": {"rotary_value": True}}, CAUSAL, "rotary_value"),
    "pooling": (ENCODER, {**CLASSES, "pooling": "mean"}, "pooling"),
    "objective": ({}, MASKED, "objective.kind"),
    "half_values": ({**ENCODER, "rope": {"rotary_value": True, "pairing": "half"}}, MASKED, "pairing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_architecture_can_have_is_refused_by_name(case: str, tmp_path: Path) -> None:
    model, objective, named = REFUSED[case]
    network, wanted = our_model({**SIZES, **model}, objective)
    save_ours(network, wanted, tmp_path / "run")
    with pytest.raises(ValueError, match=named) as caught:
        export(tmp_path / "run", tmp_path / "theirs")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "theirs").exists()


def test_a_weight_that_the_precision_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    network, wanted = our_model(SIZES, CAUSAL)
    with torch.no_grad():
        network.blocks[1].mlp.down_proj.weight[3, 2] = -7e4
    save_ours(network, wanted, tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"--dtype float16: weight model\.layers\.1\.mlp\.down_proj.* -?7e\+04.*6\.55e\+04"
    ) as caught:
        export(tmp_path / "run", tmp_path / "theirs", dtype="float16")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "theirs").exists()
    export(tmp_path / "run", tmp_path / "theirs", dtype="bfloat16")


def test_a_pattern_of_full_layers_alone_is_no_pattern(tmp_path: Path) -> None:
    network, wanted = our_model({**SIZES, "layers": ["full", "full"]}, CAUSAL)
    save_ours(network, wanted, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "theirs")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    tokens = some_tokens(TRAINED)
    torch.testing.assert_close(
        their_logits(theirs, tokens), our_logits(network, wanted, tokens), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        *(
            ({"max_shard_size": size}, f"--max-shard-size {size}: not a size")
            for size in ("big", "-5GB", "0GB", "nanGB", "infGB", "5", "5XB")
        ),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"tokenizer": Path("nowhere.model")}, "nowhere.model"),
        ({"max_position_embeddings": 64}, "--max-position-embeddings 64"),
    ],
)
def test_an_option_that_cannot_be_honoured_leaves_nothing_behind(
    options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    network, wanted = our_model({**SIZES, "rope": {"scaling": SCALINGS["dynamic"]}}, CAUSAL)
    save_ours(network, wanted, tmp_path / "run")
    with pytest.raises(ValueError, match=named) as caught:
        export(tmp_path / "run", tmp_path / "theirs", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "theirs").exists()
