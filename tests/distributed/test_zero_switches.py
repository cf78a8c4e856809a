"""ZeRO's offload and hpZ on real gloo processes against plain PyTorch; the preflight under them, and after it."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from spawn import run_ranks
from training import gradients_in, make_config, train_plainly, train_with_engine

from roformer_dist.parity.composition import ZERO_COMPARED, ZERO_SWITCHES, switch_refusal

STEPS = 4
HOST = {"parallel__offload_optimizer": "cpu"}
EVERYTHING = HOST | {"parallel__offload_parameters": "cpu"}
CASES: dict[str, dict[str, Any]] = {
    "zero1-optimizer": {"parallel__zero_stage": 1, **HOST},
    "zero2-optimizer": {"parallel__zero_stage": 2, **HOST, "train__micro_batch_size": 1},
    "zero3-optimizer": {"parallel__zero_stage": 3, **HOST},
    "zero3-parameters": {"parallel__zero_stage": 3, "parallel__offload_parameters": "cpu"},
    "zero3-hpz": {"parallel__zero_stage": 3, "parallel__hpz_partition_size": 2},
    "zero3-everything": {"parallel__zero_stage": 3, "parallel__hpz_partition_size": 2, **EVERYTHING},
}
BF16 = ["zero1-optimizer", "zero2-optimizer", "zero3-everything"]
PREFLIGHTS: dict[str, dict[str, Any]] = {
    "zero0": {"parallel__zero_stage": 0},
    "zero1": {"parallel__zero_stage": 1},
    "zero3": {"parallel__zero_stage": 3},
    "zero1-optimizer": CASES["zero1-optimizer"],
    "zero3-everything": CASES["zero3-everything"],
}


def _configure(changes: dict[str, Any]) -> Any:
    return make_config(**{"train__micro_batch_size": 2, **changes})


def _train_all(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    results = {name: train_with_engine(_configure(changes), STEPS) for name, changes in CASES.items()}
    for name in BF16:
        results[f"{name}-bf16"] = train_with_engine(_configure(CASES[name]), 1, precision="bf16")
    return results if rank == 0 else {}


@pytest.fixture(scope="module")
def trained() -> dict[str, dict[str, Any]]:
    return run_ranks(4, _train_all, timeout_s=240)[0]


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return train_plainly(make_config(), STEPS)


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_plain_pytorch_computes(
    case: str, trained: dict[str, dict[str, Any]], reference: dict[str, Any]
) -> None:
    ours, theirs = trained[case], reference
    whole = torch.stack([grad.norm() for grad in theirs["gradients"].values()]).norm()
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    for name, expected in theirs["gradients"].items():
        bound = 1e-5 * max(expected.norm(), 1e-3 * whole)
        assert (ours["gradients"][name] - expected).norm() <= bound, name
    torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=2e-5, atol=0)
    torch.testing.assert_close(ours["norms"], theirs["norms"], rtol=2e-4, atol=0)
    for name, expected in theirs["parameters"].items():
        assert (ours["parameters"][name] - expected).norm() <= 1e-4 * expected.norm(), name


def test_the_page_of_composition_says_what_is_compared_here() -> None:
    names = {frozenset(keys): name for name, keys in ZERO_SWITCHES.items()}
    compared = set()
    for changes in CASES.values():
        keys = {key.replace("__", ".") for key in changes if key.startswith("parallel__")}
        compared.add((names[frozenset(keys - {"parallel.zero_stage"})], changes["parallel__zero_stage"]))
    assert compared == ZERO_COMPARED
    assert [pair for pair in ZERO_COMPARED if switch_refusal(*pair)] == []


@pytest.mark.parametrize("case", BF16)
def test_bf16_is_as_exact_as_bf16_in_one_process(
    case: str, trained: dict[str, dict[str, Any]], reference: dict[str, Any]
) -> None:
    exact, plain = reference["gradients"], gradients_in(torch.bfloat16)

    def error(gradients: dict[str, torch.Tensor]) -> float:
        return float(torch.stack([(gradients[name].float() - exact[name]).norm() for name in exact]).norm())

    assert error(trained[f"{case}-bf16"]["gradients"]) <= 1.5 * error(plain)


# DeepSpeed makes a group once a process, of all ranks at its first engine and of hpZ's: the run's engine has it too.
GROUPS_KEPT = {"zero0": 1, "zero3-everything": 1}


def _alive() -> dict[str, int]:
    """What training leaves: engines, networks, parameters, bytes of tensors, process groups, random numbers drawn."""
    import deepspeed
    from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
    from torch import nn

    kinds = {
        "engines": deepspeed.DeepSpeedEngine,
        "optimizers": (DeepSpeedOptimizer, torch.optim.Optimizer),
        "modules": nn.Module,
        "parameters": nn.Parameter,
    }
    _occupy_threads()
    found = gc.get_objects()
    counts = {name: sum(issubclass(type(item), kind) for item in found) for name, kind in kinds.items()}
    tensors = [item for item in found if issubclass(type(item), torch.Tensor)]
    counts["bytes"] = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    counts["groups"] = len(torch.distributed.distributed_c10d._world.pg_map)
    counts["random"] = hash(torch.random.get_rng_state().numpy().tobytes())
    return counts


def _occupy_threads() -> None:
    """Give each thread of gloo a new message: it keeps the tensors of its last one, which may be a network's."""
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        sums = [torch.distributed.all_reduce(torch.zeros(1), group=group, async_op=True) for _ in range(16)]
        for work in sums:
            work.wait()


def _preflight_all(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    from roformer_dist.kernels.attention import choose_kernel
    from roformer_dist.parallel.comm import GroupComm
    from roformer_dist.parallel.mesh import build_mesh
    from roformer_dist.parity.preflight import preflight

    device, kernel = torch.device("cpu"), choose_kernel("sdpa", "cpu")[0]
    mesh = build_mesh(GroupComm(), ulysses_size=2, ring_size=1)
    results: dict[str, Any] = {}
    for name, changes in PREFLIGHTS.items():
        run_dir = folder / name
        if rank == 0:
            run_dir.mkdir()
        before = _alive()
        words = preflight(_configure(changes), mesh, kernel, "fp32", run_dir, device)
        results[name] = (words, before, _alive())
    return results


@pytest.fixture(scope="module")
def preflights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("preflights")
    return folder, run_ranks(4, _preflight_all, folder, timeout_s=240)


@pytest.mark.parametrize("case", PREFLIGHTS)
def test_the_preflight_compares_under_the_runs_own_zero(
    case: str, preflights: tuple[Path, list[dict[str, Any]]]
) -> None:
    folder, results = preflights
    rows = json.loads((folder / case / "preflight.json").read_text())["rows"]
    assert {row["compared"] for row in rows} >= {"gradients", "parameters"}
    assert all(row["failed"] == 0 and row["error"] <= row["allowed"] for row in rows)
    assert results[0][case][0].startswith("passed in")


@pytest.mark.parametrize("case", PREFLIGHTS)
def test_the_preflight_leaves_nothing_behind(
    case: str, preflights: tuple[Path, list[dict[str, Any]]]
) -> None:
    for result in preflights[1]:
        _, before, after = result[case]
        # The scalar of the last sum may still be with gloo's thread; a network would be 2.6 MB.
        left = after.pop("bytes") - before.pop("bytes")
        assert abs(left) < 100, left
        assert after == before | {"groups": before["groups"] + GROUPS_KEPT.get(case, 0)}
