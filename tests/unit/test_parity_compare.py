"""The bounds of parity at their edges: what is just allowed and what is just too much, for every comparison."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from roformer_dist.parity.compare import Outcome, compare_bf16, compare_exactly, compare_fp32, worst


def vector(norm: float) -> Tensor:
    return torch.tensor([norm, *[0.0] * 9], dtype=torch.float64)


TOKENS = {
    "holders": torch.ones(4),
    "positions": torch.arange(4.0),
    "phases": torch.arange(8.0).view(4, 2),
    "replicas": torch.tensor([2.0]),
}
WHOLE = {"large": vector(1.0), "small": vector(1e-4)}
REFERENCE = Outcome(TOKENS, 7, (4.0, 3.0), (2.0, 1.0), WHOLE, WHOLE)


@pytest.mark.parametrize(
    ("field", "kind", "name", "allowed"),
    [
        ("losses", "loss", "step 1", 1e-5 * 4),
        ("losses", "loss", "step 2", 1e-4 * 3),
        ("grad_norms", "gradient norm", "step 1", 1e-5 * 2),
        ("grad_norms", "gradient norm", "step 2", 1e-4),
        ("gradients", "gradients", "large", 1e-5),
        # Of a small tensor, a thousandth of all of them counts.
        ("gradients", "gradients", "small", 1e-5 * 1e-3),
        ("moves", "parameters", "large", 1e-3),
        ("moves", "parameters", "small", 1e-3 * 1e-3),
    ],
)
def test_float32_is_allowed_its_rounding_and_no_more(
    field: str, kind: str, name: str, allowed: float
) -> None:
    def failed(error: float) -> list[tuple[str, str]]:
        values: Any = getattr(REFERENCE, field)
        if isinstance(values, dict):
            values = values | {name: values[name] + vector(error)}
        else:
            values = tuple(x + error if name == f"step {i}" else x for i, x in enumerate(values, 1))
        checks = compare_fp32(replace(REFERENCE, **{field: values}), REFERENCE)
        assert len(checks) == 8
        # Nothing else is off at all; a NaN is farthest beyond every bound.
        assert (worst(checks).kind, worst(checks).name) == (kind, name)
        return [(check.kind, check.name) for check in checks if not check.passed]

    assert failed(0.9 * allowed) == []
    assert failed(1.1 * allowed) == failed(math.nan) == [(kind, name)]


def test_a_parameter_that_only_one_side_has_is_an_error() -> None:
    for ours, theirs in ((WHOLE, WHOLE | {"more": vector(0.0)}), (WHOLE | {"more": vector(0.0)}, WHOLE)):
        checks = compare_fp32(replace(REFERENCE, gradients=ours), replace(REFERENCE, gradients=theirs))
        assert [check.name for check in checks if not check.passed] == ["more"]
        assert worst(checks).name == "more"


@pytest.mark.parametrize("kind", TOKENS)
def test_tokens_are_compared_exactly_and_the_first_wrong_one_is_named(kind: str) -> None:
    assert all(check.passed for check in compare_exactly(REFERENCE, REFERENCE))
    wrong = TOKENS[kind].clone()
    wrong[-1] += 1e-6
    (check,) = (
        c
        for c in compare_exactly(replace(REFERENCE, tokens=TOKENS | {kind: wrong}), REFERENCE)
        if not c.passed
    )
    assert (check.kind, check.error) == (kind, 1.0)
    assert check.name == ("replica 0" if kind == "replicas" else "token 3")


def test_another_checksum_of_labels_is_an_error() -> None:
    (check,) = (c for c in compare_exactly(replace(REFERENCE, label_checksum=8), REFERENCE) if not c.passed)
    assert check.kind == "labels' checksum"


def test_bf16_is_allowed_twice_the_error_of_one_process() -> None:
    alone = replace(REFERENCE, gradients=WHOLE | {"large": vector(1.01)})

    def failed(large: float, small: float) -> list[str]:
        found = replace(REFERENCE, gradients={"large": vector(1 + large), "small": vector(1e-4 + small)})
        return [check.name for check in compare_bf16([found], [alone], [REFERENCE]) if not check.passed]

    # One process is right about the small one by chance: a thousandth of all errors counts there.
    assert failed(0.0199, 1.99e-5) == []
    assert failed(0.0201, 2.01e-5) == ["large", "small"]
