"""PURE: which choices of a configuration go together, found by asking the configuration for each pair of them.

docs/composition.md is written from this, and ``tests/parity/test_composition.py`` compares meshes with one
process over rows that contain the pairs that are said to work:

    python -m roformer_dist.parity.composition > docs/composition.md
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

from roformer_dist.config import Config
from roformer_dist.config.load import ConfigError, parse_config

# One choice of each kind, by name.
Row = dict[str, str]
# Two kinds, each with a choice.
Pair = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Choice:
    """One value of a kind of choice.

    Attributes:
        family: what it has in common with others; the short table pairs families, the full one choices.
        keys: dotted keys that it sets; everything else is as in ``BASE``.
    """

    family: str
    keys: Mapping[str, Any] = field(default_factory=dict)


BASE: dict[str, Any] = {
    "name": "composition",
    "model": {
        "vocab_size": 101,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 8,
        "intermediate_size": 80,
        "rope": {},
    },
    "data": {
        "tokenizer": "tokenizer.model",
        "train": {"shards": "train", "plan": "no.plan"},
        "validation": {"shards": "validation", "plan": "no.plan"},
    },
    "parallel": {},
    "train": {"seq_len": 96, "tokens_per_step": 384, "num_steps": 100},
    "optimizer": {"lr": 1e-3},
    "schedule": {"kind": "cosine", "warmup_steps": 10},
    "checkpoint": {"every_steps": 50},
    "validation": {"every_steps": 50, "rows": 8},
}


def _scaled(kind: str, **values: Any) -> dict[str, Any]:
    return {"model.rope.scaling": {"kind": kind, **values}}


def _placed(kind: str, **values: Any) -> dict[str, Any]:
    return {"model.position": {"kind": kind, **values}}


def _policy(kind: str, **values: Any) -> dict[str, Any]:
    return {"model.rope.policy": {"kind": kind, **values}}


def _layers(*kinds: str, **more: Any) -> dict[str, Any]:
    return {"model.layers": list(kinds)} | {f"model.{name}": value for name, value in more.items()}


def _memory(**values: Any) -> dict[str, Any]:
    return {f"train.{name}": value for name, value in values.items()}


_LONG = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 2.0, 4.0, 8.0]}
_HEADS = {"model.num_heads": 6, "model.num_kv_heads": 2}

FACTORS: dict[str, dict[str, Choice]] = {
    "position": {
        "rotary": Choice("rotation"),
        "partial, halves": Choice("rotation", {"model.rope.partial": 0.5, "model.rope.pairing": "half"}),
        "rotated values": Choice("rotation", {"model.rope.rotary_value": True}),
        "linear": Choice("rotation", _scaled("linear", factor=2.0)),
        "ntk": Choice("rotation", _scaled("ntk", factor=2.0)),
        "yarn": Choice("rotation", _scaled("yarn", factor=4.0, original_seq_len=32)),
        "llama3": Choice("rotation", _scaled("llama3", factor=4.0, original_seq_len=32)),
        "dynamic": Choice("by length", _scaled("dynamic", factor=2.0, original_seq_len=48)),
        "longrope": Choice("by length", _scaled("longrope", original_seq_len=48, factor=2.0, **_LONG)),
        "rerope": Choice("parts", _policy("rerope", window=24)),
        "self_extend": Choice("parts", _policy("self_extend", window=24, group=4)),
        "relative_bias": Choice("bias", _placed("relative_bias", num_buckets=8, max_distance=48)),
        "alibi": Choice("bias", _placed("alibi")),
        "learned": Choice("added", _placed("learned", max_seq_len=96)),
        "sinusoidal": Choice("added", _placed("sinusoidal")),
        "none": Choice("added", _placed("none")),
    },
    "scheme": {
        "one process": Choice("one process"),
        "Ulysses": Choice("Ulysses", {"parallel.ulysses_size": 2}),
        "Ulysses, replicated kv": Choice(
            "Ulysses", {"parallel.ulysses_size": 4, "model.num_kv_heads": 1, "model.num_heads": 8}
        ),
        "Ulysses, uneven heads": Choice("Ulysses", {"parallel.ulysses_size": 4} | _HEADS),
        "Ulysses, chunked": Choice("Ulysses", {"parallel.ulysses_size": 2, "parallel.head_chunks": 2}),
        "ring": Choice("ring", {"parallel.ring_size": 4}),
        "hybrid": Choice("ring", {"parallel.ulysses_size": 2, "parallel.ring_size": 2}),
        "hybrid, chunked": Choice(
            "ring", {"parallel.ulysses_size": 2, "parallel.ring_size": 2, "parallel.head_chunks": 2}
        ),
    },
    "layers": {
        "full": Choice("full"),
        "sliding": Choice("sliding", _layers("sliding", "full", sliding_window=24)),
        "linear": Choice("linear", _layers("linear", "full")),
        "linear, softmax features": Choice("linear", _layers("linear", linear_features="softmax")),
        "no_position": Choice("no_position", _layers("no_position", "full")),
    },
    "objective": {
        "causal": Choice("causal"),
        "masked": Choice("masked", {"objective": {"kind": "masked", "mask_id": 100}}),
        "classification": Choice(
            "classification", {"objective": {"kind": "classification", "num_labels": 3, "pooling": "mean"}}
        ),
    },
    "checkpointing": {
        "none": Choice("none"),
        "full": Choice("full", _memory(activation_checkpointing="full")),
        "selective": Choice("selective", _memory(activation_checkpointing="selective")),
        "offloaded": Choice(
            "selective", _memory(activation_checkpointing="selective", activation_offload=True)
        ),
    },
    "MLP": {
        "whole": Choice("whole"),
        "tiled": Choice("tiled", _memory(mlp_tile_tokens=16)),
        "compiled": Choice("compiled", _memory(compile=True)),
    },
    "ZeRO": {f"stage {n}": Choice(f"stage {n}", {"parallel.zero_stage": n}) for n in (1, 0, 2, 3)},
    "precision": {
        "fp32": Choice("fp32", _memory(precision="fp32")),
        "bf16": Choice("bf16", _memory(precision="bf16")),
    },
    "kernel": {"sdpa": Choice("sdpa"), "reference": Choice("reference", _memory(kernel="reference"))},
    "dropout": {"none": Choice("none"), "0.1": Choice("0.1", {"model.hidden_dropout": 0.1})},
    "z_loss": {"none": Choice("none"), "1e-4": Choice("1e-4", _memory(z_loss=1e-4))},
}

# What goes beyond a stage of ZeRO. The engine's alone, so that it meets the stages only, not the other kinds.
ZERO_SWITCHES: dict[str, Mapping[str, Any]] = {
    "offload_optimizer": {"parallel.offload_optimizer": "cpu"},
    "offload_parameters": {"parallel.offload_parameters": "cpu"},
    "hpz_partition_size": {"parallel.hpz_partition_size": 2},
    "the three above": {
        "parallel.offload_optimizer": "cpu",
        "parallel.offload_parameters": "cpu",
        "parallel.hpz_partition_size": 2,
    },
    "quantized_weights": {"parallel.quantized_weights": True},
    "quantized_gradients": {"parallel.quantized_gradients": True},
}
# Switch and stage that tests/distributed/test_zero_switches.py compares with plain PyTorch; it holds to this.
ZERO_COMPARED = {
    ("offload_optimizer", 1),
    ("offload_optimizer", 2),
    ("offload_optimizer", 3),
    ("offload_parameters", 3),
    ("hpz_partition_size", 3),
    ("the three above", 3),
}


def settings(row: Mapping[str, str]) -> Config:
    """The configuration of the choices in ``row``, by kind; kinds that it leaves out have their first choice.

    Raises:
        ConfigError: they do not go together.
    """
    chosen = (choices[row.get(kind, next(iter(choices)))] for kind, choices in FACTORS.items())
    return _parse({key: value for choice in chosen for key, value in choice.keys.items()})


def _parse(keys: Mapping[str, Any]) -> Config:
    values = deepcopy(BASE)
    for key, value in keys.items():
        *path, name = key.split(".")
        section = values
        for part in path:
            section = section[part]
        section[name] = deepcopy(value)
    return parse_config(values, source="composition")


def switch_refusal(switch: str, stage: int) -> str | None:
    """What the configuration says against one of ``ZERO_SWITCHES`` at a stage of ZeRO."""
    try:
        _parse({"parallel.zero_stage": stage, **ZERO_SWITCHES[switch]})
    except ConfigError as error:
        return str(error).removeprefix("composition: ")
    return None


def refusal(row: Mapping[str, str]) -> str | None:
    """What the configuration says against the choices; None if they go together."""
    try:
        settings(row)
    except ConfigError as error:
        return str(error).removeprefix("composition: ")
    return None


def pairs() -> Iterator[tuple[dict[str, str], str | None]]:
    """Every two choices of different kinds, and what is said against them."""
    for (one, these), (other, those) in combinations(FACTORS.items(), 2):
        for a in these:
            for b in those:
                row = {one: a, other: b}
                yield row, refusal(row)


def pairs_in(row: Mapping[str, str], *, families: bool) -> set[Pair]:
    """The pairs of choices, or of their families, that a row contains."""
    names = {k: FACTORS[k][name].family if families else name for k, name in row.items()}
    return {frozenset(pair) for pair in combinations(names.items(), 2)}


def covering_rows(*, families: bool) -> list[Row]:
    """Rows that together contain every pair of choices (or of families) that goes together, and every choice.

    Greedy and deterministic: each row begins with a pair that is missing, and the other kinds take what
    brings most that is missing, of equal ones the choice that was taken least.
    """
    allowed = [row for row, refused in pairs() if refused is None]
    missing = {pair for row in allowed for pair in pairs_in(row, families=families)}
    good = {frozenset(row.items()) for row in allowed}
    taken: dict[tuple[str, str], int] = {}
    rows: list[Row] = []
    for start in allowed:
        if not pairs_in(start, families=families) & missing and all(item in taken for item in start.items()):
            continue

        row = _completed(start, good, partial(_gain, missing, taken, families))
        missing -= pairs_in(row, families=families)
        for item in row.items():
            taken[item] = taken.get(item, 0) + 1
        rows.append(row)
    assert not missing
    return rows


def _gain(
    missing: set[Pair], taken: Mapping[tuple[str, str], int], families: bool, row: Row
) -> tuple[int, int]:
    """How much of what is missing a row brings; of equal ones how little its choices were taken."""
    new = pairs_in(row, families=families) & missing
    # Whatever is equal, float32: bf16 is compared over several seeds.
    return len(new), -sum(taken.get(item, 0) for item in row.items() if item[0] != "precision")


def _completed(start: Row, good: set[Pair], gain: Callable[[Row], tuple[int, int]]) -> Row:
    """``start`` with a choice of every other kind, each going together with all before."""
    row = dict(start)
    for kind in sorted(FACTORS.keys() - row.keys(), key=list(FACTORS).index):
        fitting = [
            {**row, kind: name}
            for name in FACTORS[kind]
            if all(frozenset([(kind, name), item]) in good for item in row.items())
        ]
        assert fitting, f"nothing of {kind} goes together with {row}"
        row = max(fitting, key=gain)
    return {kind: row[kind] for kind in FACTORS}


if __name__ == "__main__":
    from roformer_dist.parity.composition_page import markdown

    sys.stdout.buffer.write(markdown().encode())
