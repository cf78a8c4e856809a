"""PURE: what is compared between a mesh and one process, and the bounds that must hold.

float32: ``|g - g_ref| <= 1e-5 max(|g_ref|, 1e-3 |all gradients|)`` for every parameter's gradient. bf16: at
most twice the error that one process has in bf16 against float64, by tensor norm, over all seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GRADIENT_BOUND, SCALAR_BOUND, MOVE_BOUND, SMALL_TENSOR = 1e-5, 1e-5, 1e-3, 1e-3
# Later steps follow from updated parameters, whose first moves AdamW divides by small moments.
LATER_STEP = 10
BF16_RATIO = 2.0
BF16_ROUNDING = 2.0**-9
FEW_NUMBERS = 8


@dataclass(frozen=True)
class Outcome:
    """What a few steps gave, of the whole mesh or of one process.

    Attributes:
        tokens: for each token of the first step in the order of counters: ``holders``, ``inputs``, ``labels``,
            ``positions`` ``[T]`` and ``phases`` ``[T, F]``; and ``replicas``, the ranks of each.
        label_checksum: of the first step's labels with their counters, whatever their order.
        losses, grad_norms: one for each step.
        gradients: float, by parameter, of the first step.
        moves: what the steps changed, by parameter.
    """

    tokens: dict[str, Tensor]
    label_checksum: int
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    gradients: dict[str, Tensor]
    moves: dict[str, Tensor]


@dataclass(frozen=True)
class Check:
    """One comparison: ``error`` must be at most ``allowed``.

    Attributes:
        kind: what is compared; a row of the table.
        name: which of them, such as a parameter.
    """

    kind: str
    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """A NaN is an error."""
        return self.error <= self.allowed

    @property
    def share(self) -> float:
        """Error over what is allowed; infinite for any error where none is, and for NaN."""
        if math.isnan(self.error):
            return math.inf
        return self.error / self.allowed if self.allowed else math.inf if self.error else 0.0


def compare_exactly(found: Outcome, reference: Outcome) -> list[Check]:
    """What does not depend on precision: inputs, labels, positions and phases are the same numbers."""
    same = found.label_checksum == reference.label_checksum
    checks = [Check("labels' checksum", "all ranks", 0.0 if same else math.inf, 0.0)]
    for kind, expected in reference.tokens.items():
        if expected.numel():
            wrong = (
                (found.tokens[kind] != expected).flatten(1).any(1)
                if expected.ndim > 1
                else (found.tokens[kind] != expected)
            )
            unit = "replica" if kind == "replicas" else "token"
            first = f"{unit} {int(wrong.int().argmax())}" if bool(wrong.any()) else f"all {unit}s"
            checks.append(Check(kind, first, float(wrong.sum()), 0.0))
    return checks


def compare_fp32(found: Outcome, reference: Outcome) -> list[Check]:
    """Loss, gradients, gradient norm and parameters within rounding of float32."""
    checks = []
    for kind, ours, theirs in (
        ("loss", found.losses, reference.losses),
        ("gradient norm", found.grad_norms, reference.grad_norms),
    ):
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            bound = SCALAR_BOUND * (LATER_STEP if step else 1)
            checks.append(Check(kind, f"step {step + 1}", abs(a - b), bound * abs(b)))
    for kind, bound, ours, theirs in (
        ("gradients", GRADIENT_BOUND, found.gradients, reference.gradients),
        ("parameters", MOVE_BOUND, found.moves, reference.moves),
    ):
        least = SMALL_TENSOR * _norm(theirs.values())
        for name in sorted(ours.keys() | theirs.keys()):
            allowed = bound * max(_norm([theirs[name]]), least) if name in theirs else 0.0
            checks.append(Check(kind, name, _distance(ours, theirs, name), allowed))
    return checks


def compare_bf16(
    found: Sequence[Outcome], alone: Sequence[Outcome], exact: Sequence[Outcome], roundings: int = 1
) -> list[Check]:
    """The mesh's error in bf16 beside that of one process, both against float64; one outcome for each seed.

    ``roundings`` are those in a row that no mean over targets takes out of the loss.
    """
    checks = []
    for kind in ("losses", "grad_norms"):
        ours, theirs = (
            math.hypot(
                *(
                    a - b
                    for outcome, truth in zip(outcomes, exact, strict=True)
                    for a, b in zip(getattr(outcome, kind), getattr(truth, kind), strict=True)
                )
            )
            for outcomes in (found, alone)
        )
        # By chance one process may be right: what a rounding of the number itself is, is allowed too.
        size = math.hypot(*(value for truth in exact for value in getattr(truth, kind)))
        name = {"losses": "loss", "grad_norms": "gradient norm"}[kind]
        least = roundings * BF16_ROUNDING * size
        checks.append(Check(name, "all steps", ours, max(BF16_RATIO * theirs, least)))
    for kind, field in (("gradients", "gradients"), ("parameters", "moves")):
        errors = [
            {
                name: math.hypot(
                    *(
                        _distance(getattr(outcome, field), getattr(truth, field), part)
                        for outcome, truth in zip(outcomes, exact, strict=True)
                        for part in _judged_with(name, getattr(truth, field))
                    )
                )
                for name in getattr(exact[0], field)
            }
            for outcomes in (found, alone)
        ]
        least = SMALL_TENSOR * math.hypot(*errors[1].values())
        for name, error in errors[0].items():
            checks.append(Check(kind, name, error, BF16_RATIO * max(errors[1][name], least)))
    return checks


def _judged_with(name: str, tensors: dict[str, Tensor]) -> list[str]:
    """A tensor alone, or with its module's others where its few numbers' errors are a matter of chance."""
    if tensors[name].numel() >= FEW_NUMBERS:
        return [name]
    module = name.rpartition(".")[0]
    return [other for other in tensors if other.rpartition(".")[0] == module]


def worst(checks: Iterable[Check]) -> Check:
    """The one nearest to its bound, or farthest beyond it."""
    return max(checks, key=lambda check: check.share)


def _distance(ours: dict[str, Tensor], theirs: dict[str, Tensor], name: str) -> float:
    if name not in ours or name not in theirs:
        return math.inf
    return float((ours[name].double() - theirs[name].double()).norm())


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())
