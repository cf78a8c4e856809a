"""What a preflight's outcome is kept under: everything that it depends on, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from roformer_dist.kernels.reference import ReferenceKernel
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.parallel.in_process import run_in_process
from roformer_dist.parity import preflight
from roformer_dist.parity.composition import settings
from roformer_dist.parity.preflight import _key, _placement
from roformer_dist.parity.problem import Problem, make_problem

CPU = torch.device("cpu")


def problem(scheme: str = "Ulysses", **more: str) -> Problem:
    return make_problem(settings({"scheme": scheme, **more}), dp_size=1)


def key(of: Problem, placement: list[int] | None = None) -> str:
    return _key(of, SdpaKernel(), "fp32", CPU, placement or [0, 0])


def test_the_same_run_has_the_same_key_whatever_it_is_called() -> None:
    renamed = problem()
    renamed = replace(renamed, config=renamed.config.model_copy(update={"name": "other"}))
    assert key(problem()) == key(renamed)


def test_another_configuration_kernel_precision_or_size_has_another_key() -> None:
    keys = [
        key(problem()),
        key(problem("ring")),
        key(problem("Ulysses", ZeRO="stage 3")),
        key(problem("Ulysses", position="yarn")),
        key(replace(problem(), dp_size=2)),
        key(replace(problem(), lengths=((97,),) * 6)),
        key(problem(), [0, 1]),
        _key(problem(), ReferenceKernel(), "fp32", CPU, [0, 0]),
        _key(problem(), SdpaKernel(), "bf16", CPU, [0, 0]),
    ]
    assert len(set(keys)) == len(keys)


def other_version(changed: str, package: str) -> str:
    return "0.0" if package == changed else version(package)


def test_a_placement_is_which_ranks_share_a_host_whatever_hosts_are_called() -> None:
    def placement(hosts: str) -> list[int]:
        found = run_in_process(len(hosts), lambda comm: _placement(hosts[comm.rank], comm, CPU))
        assert all(other == found[0] for other in found)
        return found[0]

    assert placement("aabb") == placement("xxyy") == [0, 0, 2, 2]
    assert placement("abab") == [0, 1, 0, 1]


def test_another_environment_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(problem())
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "version", lambda package: "0.0")
        assert key(problem()) != before
    for changed in ("torch", "deepspeed", "flash-attn"):
        with monkeypatch.context() as patch:
            patch.setattr(preflight, "version", partial(other_version, changed))
            assert key(problem()) != before
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
        assert key(problem()) != before
    assert key(problem()) == before


def test_other_code_has_another_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "kernels" / "attention.py"
    file.parent.mkdir()
    monkeypatch.setattr(preflight.roformer_dist, "__file__", str(tmp_path / "__init__.py"))
    keys = set()
    for code in ("first", "second"):
        file.write_text(code)
        keys.add(key(problem()))
    assert len(keys) == 2
