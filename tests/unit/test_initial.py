"""A run that starts from parameters: what may differ between its model and theirs."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from config_example import BASE
from exchanged import our_model, save_ours

from roformer_dist.config import Config, parse_config
from roformer_dist.engine.checkpoint import CheckpointError, CheckpointReader
from roformer_dist.engine.initial import check_same_model, find_checkpoint


def example(**model: Any) -> Config:
    values = tomllib.loads(BASE)
    values["model"] |= model
    return parse_config(values, source="test")


def imported(folder: Path) -> CheckpointReader:
    config = example()
    network, objective = our_model(config.model.model_dump(mode="json"), {"kind": "causal"})
    return CheckpointReader(save_ours(network, objective, folder))


def test_frequencies_and_dropout_may_differ_and_are_named(tmp_path: Path) -> None:
    reader = imported(tmp_path)
    assert check_same_model(reader, example()) == []
    changed = check_same_model(
        reader,
        example(hidden_dropout=0.1, head_dim=8, rope={"theta": 5e5, "scaling": {"kind": "ntk", "factor": 2}}),
    )
    assert [key for key, _, _ in changed] == [
        "model.hidden_dropout",
        "model.rope.theta",
        "model.rope.scaling",
    ]


@pytest.mark.parametrize(
    ("key", "model"),
    [
        ("model.intermediate_size", {"intermediate_size": 40}),
        ("model.rope.pairing", {"rope": {"pairing": "half"}}),
        ("model.layers", {"layers": ["no_position"]}),
        ("model.norm_eps", {"norm_eps": 1e-5}),
        ("model.num_kv_heads", {"num_kv_heads": 4}),
    ],
)
def test_anything_else_is_refused_by_name(key: str, model: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=key) as caught:
        check_same_model(imported(tmp_path), example(**model))
    assert "\n" not in str(caught.value)


def test_parameters_alone_have_no_moments_to_resume_with(tmp_path: Path) -> None:
    reader = imported(tmp_path)
    assert find_checkpoint(tmp_path, report=print) == reader.path
    with pytest.raises(CheckpointError, match=r"checkpoint\.init_from"):
        reader.read("embedding.weight", "exp_avg", 0, 1)


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        find_checkpoint(tmp_path, report=print)
