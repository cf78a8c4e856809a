"""The Engine on real gloo processes against plain PyTorch: ZeRO stages, meshes, micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spawn import run_ranks
from training import gradients_in, make_config, train_plainly, train_with_engine

STEPS = 10
# (ulysses_size, ring_size, zero_stage, micro_batch_size) on four processes: every stage, all kinds of meshes,
# three accumulations.
CASES = [
    *[
        (2, 1, 0, 2),
        (2, 1, 1, 4),
        (2, 1, 2, 1),
        (2, 1, 3, 2),
        (4, 1, 1, 2),
        (4, 1, 3, 8),
        (1, 1, 2, 2),
        (1, 1, 3, 1),
    ],
    *[(2, 2, 1, 4), (2, 2, 3, 2), (1, 2, 2, 2), (1, 4, 3, 8)],
]


BF16_STAGES = [1, 2, 3]


def _train_all(rank: int, world_size: int) -> dict[Any, dict[str, Any]]:
    results: dict[Any, dict[str, Any]] = {}
    for case in CASES:
        ulysses_size, ring_size, zero_stage, micro_batch_size = case
        config = make_config(
            parallel__sp_size=ulysses_size * ring_size,
            parallel__ring_size=ring_size,
            parallel__zero_stage=zero_stage,
            train__micro_batch_size=micro_batch_size,
        )
        results[case] = train_with_engine(config, STEPS)
    for zero_stage in BF16_STAGES:
        config = make_config(parallel__zero_stage=zero_stage, train__micro_batch_size=2)
        results[zero_stage] = train_with_engine(config, 2, precision="bf16")
    return results if rank == 0 else {}


@pytest.fixture(scope="module")
def trained() -> dict[Any, dict[str, Any]]:
    return run_ranks(4, _train_all)[0]


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return train_plainly(make_config(), STEPS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "u{}-r{}-zero{}-micro{}".format(*case))
class TestEngineEqualsPlainPyTorch:
    def test_every_gradient_of_the_first_step(self, case, trained, reference):
        ours, theirs = trained[case]["gradients"], reference["gradients"]
        assert ours.keys() == theirs.keys()
        whole = torch.stack([grad.norm() for grad in theirs.values()]).norm()
        for name, expected in theirs.items():
            bound = 1e-5 * max(expected.norm(), 1e-3 * whole)
            assert (ours[name] - expected).norm() <= bound, name

    def test_losses_and_gradient_norms_of_ten_steps(self, case, trained, reference):
        # Ten steps of AdamW, whose first ones divide by a moment near zero, amplify rounding.
        torch.testing.assert_close(trained[case]["losses"], reference["losses"], rtol=2e-5, atol=0)
        torch.testing.assert_close(trained[case]["norms"], reference["norms"], rtol=2e-4, atol=0)

    def test_every_parameter_after_ten_steps(self, case, trained, reference):
        for name, expected in reference["parameters"].items():
            difference = (trained[case]["parameters"][name] - expected).norm()
            assert difference <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("zero_stage", BF16_STAGES)
def test_bf16_is_as_exact_as_bf16_in_one_process(zero_stage, trained, reference):
    exact = reference["gradients"]
    plain = gradients_in(torch.bfloat16)

    def error(gradients: dict[str, torch.Tensor]) -> float:
        parts = [(gradients[name].float() - grad).norm() for name, grad in exact.items()]
        return float(torch.stack(parts).norm())

    # Gradients are reduced in fp32, so spreading must not add to what bf16 itself costs.
    assert error(trained[zero_stage]["gradients"]) <= 1.5 * error(plain)
    assert trained[zero_stage]["losses"][0] == pytest.approx(reference["losses"][0], rel=5e-3)


def _wrong_scale(rank: int, world_size: int) -> float:
    """The classic fault: the loss divided by this rank's own number of targets."""
    from roformer_dist.engine.engine import Engine

    original = Engine.forward_backward

    def own_targets(self: Engine, micro_batches: Any, num_valid: int) -> tuple[float, int]:
        del num_valid
        own = sum(batch.num_valid for batch in micro_batches) * self.shape.world_size
        return original(self, micro_batches, max(own, 1))

    Engine.forward_backward = own_targets
    result = train_with_engine(make_config(train__micro_batch_size=2), 1)
    reference = train_plainly(make_config(), 1)
    name = "blocks.0.mlp.up_proj.weight"
    expected = reference["gradients"][name]
    return float((result["gradients"][name] - expected).norm() / expected.norm())


def test_dividing_by_a_ranks_own_targets_is_noticed():
    # The comparison above is only worth something if the fault that everyone has shipped breaks it.
    assert run_ranks(2, _wrong_scale)[0] > 1e-3
