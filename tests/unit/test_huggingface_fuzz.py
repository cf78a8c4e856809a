"""Damaged configurations and indexes: a model or one line, never another exception and never a wait."""

from __future__ import annotations

import copy
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from exchanged import SCALINGS, their_model

from roformer_dist.exchange import import_hf
from roformer_dist.interop.settings import HuggingFaceError, number

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", {"num_key_value_heads": 2, "head_dim": 8}),
    "neox": ("GPTNeoXForCausalLM", {"hidden_act": "gelu"}),
    "roformer": ("RoFormerForMaskedLM", {"embedding_size": 24}),
    "classes": ("RoFormerForSequenceClassification", {"num_labels": 3}),
}
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 10**9, 10**30, -(10**30), 10**400, 0.0, 0.5, -1.5, 1e-300, 1e308,
    float("nan"), float("inf"), "", "8", "default", "\u2581", [], [1], [1.0] * 4, [None], ["full_attention"], {},
    {"rope_type": "linear"}, {"a": {"b": []}},
]  # fmt: skip
ROPE_KEYS = [
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor",
    "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "attention_factor", "short_factor",
    "long_factor", "low_freq_factor", "high_freq_factor", "bend",
]  # fmt: skip
MUTATIONS = 80
# A mutation takes 30 ms; one that makes something of its own size would take memory or minutes.
LONGEST_S = 5.0


def mutated(config: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """``config`` with one to three of its values, or of its rope's, replaced, removed or added."""
    config = copy.deepcopy(config)
    if draw.random() < 0.5 and "rope_parameters" in config:
        scaling = copy.deepcopy(draw.choice(list(SCALINGS.values())))
        config["rope_parameters"] = {"rope_theta": 5000.0, **scaling}
    for _ in range(draw.randint(1, 3)):
        target, keys = config, [*config, "rope_theta", "rope_scaling", "rotary_pct", "layer_types"]
        if draw.random() < 0.5 and isinstance(config.get("rope_parameters"), dict):
            target, keys = config["rope_parameters"], ROPE_KEYS
        key = draw.choice(keys)
        if draw.random() < 0.2:
            target.pop(key, None)
        else:
            target[key] = copy.deepcopy(draw.choice(JUNK))
    return config


def saved(family: str, folder: Path) -> dict[str, Any]:
    """A model of ``family``, written to ``folder``; its configuration."""
    architecture, values = FAMILIES[family]
    their_model(architecture, **values).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_damaged_configuration_is_a_model_or_one_line(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    config = saved(family, folder)
    refused = 0
    for seed in range(MUTATIONS):
        damaged = mutated(config, random.Random(f"{family} {seed}"))
        (folder / "config.json").write_text(json.dumps(damaged))
        said, started = "", time.monotonic()
        try:
            import_hf(str(folder), tmp_path / f"ours_{seed}")
        except ValueError as error:
            said = str(error)
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__} {error}: {damaged}") from error
        assert time.monotonic() - started < LONGEST_S, damaged
        assert "\n" not in said, damaged
        assert (tmp_path / f"ours_{seed}").exists() == (not said), damaged
        refused += bool(said)
    assert 0 < refused < MUTATIONS


# Values that a model of the same class may have, and that change what it computes.
OTHERS: dict[str, list[tuple[str, Any]]] = {
    "llama": [("pretraining_tp", 2)],
    "qwen2": [("use_sliding_window", True), ("layer_types", ["sliding_attention", "full_attention"])],
    "qwen3": [("use_sliding_window", True), ("layer_types", ["full_attention", "sliding_attention"])],
    "neox": [("hidden_act", "gelu_fast")],
    "roformer": [("hidden_act", "gelu_new"), ("is_decoder", True), ("add_cross_attention", True)],
    "classes": [("is_decoder", True)],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_may_compute_differently_is_refused_by_its_key(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    config = saved(family, folder)
    for key, value in OTHERS[family]:
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ValueError, match=key):
            import_hf(str(folder), tmp_path / "ours")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, True, "8", None, [1] * 1000])
def test_a_number_is_finite_and_no_flag_and_what_else_it_is_is_shown_in_short(value: object) -> None:
    assert number(3, "key") == 3.0
    with pytest.raises(HuggingFaceError, match=r"key = .* must be a finite number") as caught:
        number(value, "key")
    assert len(str(caught.value)) < 120
