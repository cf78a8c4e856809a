"""Options that save memory, under DeepSpeed on real processes: the gradients of plain PyTorch at every ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spawn import run_ranks
from training import make_config, train_plainly, train_with_engine

STEPS = 2
# (zero_stage, sp_size) -> what is switched on; tiles do not divide the 13 or 26 tokens of a rank.
CASES: dict[tuple[int, int], dict[str, Any]] = {
    (0, 2): {"activation_checkpointing": "full"},
    (1, 1): {"activation_checkpointing": "selective", "mlp_tile_tokens": 5},
    (2, 2): {"activation_checkpointing": "selective", "activation_offload": True},
    (3, 1): {"activation_checkpointing": "full", "activation_offload": True, "mlp_tile_tokens": 5},
    (3, 2): {"activation_checkpointing": "selective", "mlp_tile_tokens": 4},
}


def train_all(rank: int, world_size: int) -> dict[tuple[int, int], dict[str, Any]]:
    results = {}
    for (zero_stage, sp_size), options in CASES.items():
        changes = {f"train__{key}": value for key, value in options.items()}
        config = make_config(parallel__zero_stage=zero_stage, parallel__sp_size=sp_size, **changes)
        results[zero_stage, sp_size] = train_with_engine(config, STEPS)
    return results if rank == 0 else {}


@pytest.fixture(scope="module")
def trained() -> dict[tuple[int, int], dict[str, Any]]:
    return run_ranks(2, train_all)[0]


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return train_plainly(make_config(), STEPS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"zero{case[0]}-sp{case[1]}")
def test_losses_and_gradients_are_those_of_plain_pytorch(
    trained: dict[Any, dict[str, Any]], expected: dict[str, Any], case: tuple[int, int]
) -> None:
    found = trained[case]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    total = float(torch.stack([g.norm() for g in expected["gradients"].values()]).norm())
    for name, want in expected["gradients"].items():
        error = float((found["gradients"][name] - want).norm())
        assert error <= 1e-5 * max(float(want.norm()), 1e-3 * total), name
