"""Parameter groups: what decays and what does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from roformer_dist.config.model import ModelConfig
from roformer_dist.config.training import OptimizerConfig
from roformer_dist.engine.optimizer import build_optimizer, parameter_groups
from roformer_dist.model.roformer import RoFormer, build_model
from roformer_dist.objectives import SummedLoss


def network(*, masked: bool = False, **changes: Any) -> RoFormer:
    values = {"vocab_size": 11, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "intermediate_size": 12}
    return build_model(ModelConfig(**values | changes), masked=masked, seed=0)


CASES = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "biases and layer norms": {"bias": True, "norm": "layer_norm", "block": "post_norm", "mlp": "gelu"},
    "masked": {"masked": True},
    "masked, untied": {"masked": True, "tie_embeddings": False},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_matrices_decay_and_norms_biases_and_embeddings_do_not(changes: dict[str, Any]) -> None:
    net = network(**changes)
    names = {id(p): name for name, p in net.named_parameters()}
    decayed, kept = (
        {names[id(p)] for p in group["params"]}
        for group in parameter_groups(SummedLoss(net), weight_decay=0.3)
    )
    expected = {
        name
        for name in names.values()
        if name.endswith("proj.weight") or name in ("head.transform.weight", "head.projection.weight")
    }
    assert decayed == expected
    assert kept == set(names.values()) - expected
    assert "embedding.weight" in kept
    # An untied output layer is a matrix like others; a tied one is the embedding.
    assert ("head.projection.weight" in decayed) == (changes.get("tie_embeddings") is False)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_every_parameter_is_in_one_group_once(changes: dict[str, Any]) -> None:
    net = network(**changes)
    groups = parameter_groups(net, weight_decay=0.3)
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in net.parameters()}
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


def test_the_optimizer_has_the_configuration_s_numbers_and_decays_what_it_should() -> None:
    net = network()
    config = OptimizerConfig(lr=0.5, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.1)
    optimizer = build_optimizer(net, config)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.9), 1e-7)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # Without a gradient only the decay moves anything: by lr * weight_decay.
    for name, parameter in net.named_parameters():
        factor = 1 - 0.5 * 0.1 if name.endswith("proj.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
