"""Faults that others have shipped, planted one by one: parity of a shrunken recipe must find each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from roformer_dist.batch import IGNORE_INDEX, Batch
from roformer_dist.config import Config, RunShape, load_config
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.parallel.forms import BiasedForm
from roformer_dist.parallel.hops import Hop
from roformer_dist.parallel.layout import ContiguousLayout, ZigzagLayout
from roformer_dist.parallel.ring import RingScheme
from roformer_dist.parallel.ulysses import UlyssesScheme
from roformer_dist.parity import replica
from roformer_dist.parity.check import Report, check_in_process
from roformer_dist.parity.command import verdict, with_mesh
from roformer_dist.parity.composition import settings

RECIPES = Path(__file__).parent.parent.parent / "configs"
Patch = pytest.MonkeyPatch


def config(sp: int, ring: int = 1, name: str = "quickstart") -> Config:
    return with_mesh(load_config(RECIPES / f"{name}.toml"), sp=sp, ring=ring, zero=None)


def failed(report: Report) -> set[str]:
    return {row["compared"] for row in report.rows() if row["failed"]}


def damage_slices(patch: Patch, kind: type, damage: Callable[[Batch, int], Batch]) -> None:
    original = kind.slice
    patch.setattr(kind, "slice", lambda self, batch, rank: damage(original(self, batch, rank), rank))


def shift_after_slicing(patch: Patch) -> None:
    """Each shard makes its own targets: its last token has none."""

    def damage(part: Batch, rank: int) -> Batch:
        labels = part.labels.clone()
        labels[:, -1] = IGNORE_INDEX
        return replace(part, labels=labels)

    damage_slices(patch, ContiguousLayout, damage)


def unshifted_labels(patch: Patch) -> None:
    def damage(part: Batch, rank: int) -> Batch:
        valid = part.labels != IGNORE_INDEX
        return replace(part, labels=torch.where(valid, part.input_ids, part.labels))

    damage_slices(patch, ContiguousLayout, damage)


def wrong_inputs(patch: Patch) -> None:
    """A shard reads its neighbour's tokens under its own targets and positions."""

    def damage(part: Batch, rank: int) -> Batch:
        return replace(part, input_ids=part.input_ids.roll(1, dims=1)) if rank == 1 else part

    damage_slices(patch, ContiguousLayout, damage)


def scale_by_sp(patch: Patch) -> None:
    original = replica.loss_scale

    def scaled(shape: RunShape, num_valid: int) -> float:
        return original(shape, num_valid) * shape.sp_size

    patch.setattr(replica, "loss_scale", scaled)


def skip_a_hop(patch: Patch) -> None:
    original = RingScheme._plan

    def skipping(self: RingScheme, key: Any) -> list[Hop]:
        hops = original(self, key)
        return [replace(hop, calls=()) if number == 1 else hop for number, hop in enumerate(hops)]

    patch.setattr(RingScheme, "_plan", skipping)


def reverse_a_half(patch: Patch) -> None:
    def damage(part: Batch, rank: int) -> Batch:
        half = part.input_ids.shape[1] // 2
        order = torch.cat([torch.arange(half).flip(0), torch.arange(half, part.input_ids.shape[1])])
        fields = ("input_ids", "labels", "position_ids", "counters")
        return (
            replace(part, **{name: getattr(part, name)[:, order] for name in fields}) if rank == 1 else part
        )

    damage_slices(patch, ZigzagLayout, damage)


def sum_replicated_twice(patch: Patch) -> None:
    original = UlyssesScheme._to_sequence

    def twice(self: UlyssesScheme, heads: Any, x: Tensor, target: Tensor, *, adds: bool = False) -> None:
        original(self, heads, x, target, adds=adds)
        target.mul_(2 if adds else 1)

    patch.setattr(UlyssesScheme, "_to_sequence", twice)


def reset_positions(patch: Patch) -> None:
    def damage(part: Batch, rank: int) -> Batch:
        local = torch.arange(part.input_ids.shape[1]).expand_as(part.position_ids)
        return replace(part, position_ids=local.contiguous())

    damage_slices(patch, ContiguousLayout, damage)


def differentiate_through_the_merge(patch: Patch) -> None:
    original = RingScheme.backward

    class OwnLse(SdpaKernel):
        def backward(self, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any) -> Any:
            out, lse = super().forward(q, k, v, *rest)
            return super().backward(dout, q, k, v, out, lse, *rest)

    def backward(self: RingScheme, kernel: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return original(self, OwnLse(), *arguments)

    patch.setattr(RingScheme, "backward", backward)


def keep_a_bias_gradient(patch: Patch) -> None:
    """Rank 0's heads alone give the bias its gradient, as if it had been summed before the heads were spread."""
    original = BiasedForm.backward

    def first_rank_only(self: BiasedForm, dout: Tensor, saved: Any, heads: range) -> Any:
        grads = original(self, dout, saved, heads)
        if self.dvalues is not None and heads.start:
            self.dvalues.zero_()
        return grads

    patch.setattr(BiasedForm, "backward", first_rank_only)


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_a_bias_gradient_of_some_heads_alone_is_found(objective: str, monkeypatch: Patch) -> None:
    biased = settings({"position": "relative_bias", "scheme": "Ulysses", "objective": objective})
    assert check_in_process(biased, ["fp32"], 1).passed
    keep_a_bias_gradient(monkeypatch)
    report = check_in_process(biased, ["fp32"], 1)
    assert {"gradients", "gradient norm"} <= failed(report)
    assert not {"labels", "positions"} & failed(report)
    (wrong,) = {c.name for c in report.checks["fp32"] if c.kind == "gradients" and not c.passed}
    assert "bias" in wrong


# What each fault must show in, and what it leaves right: a test of the loss alone would pass the last ones.
FAULTS = [
    (shift_after_slicing, (2, 1), {"labels", "labels' checksum", "loss", "gradients"}, {"positions"}),
    (unshifted_labels, (2, 1), {"labels", "labels' checksum", "loss", "gradients"}, {"positions"}),
    (wrong_inputs, (2, 1), {"inputs", "loss", "gradients"}, {"labels", "positions"}),
    (scale_by_sp, (2, 1), {"gradients", "gradient norm"}, {"labels", "positions"}),
    (skip_a_hop, (3, 3), {"loss", "gradients"}, {"labels", "positions"}),
    (reverse_a_half, (4, 2), {"loss", "gradients"}, {"labels", "positions"}),
    (reset_positions, (2, 1), {"positions", "phases", "loss", "gradients"}, {"labels"}),
    (sum_replicated_twice, (4, 1), {"gradients", "gradient norm"}, {"labels", "positions"}),
    (differentiate_through_the_merge, (3, 3), {"gradients"}, {"labels", "positions"}),
]


@pytest.mark.parametrize(
    ("plant", "mesh", "shown", "unharmed"), FAULTS, ids=lambda x: getattr(x, "__name__", None)
)
def test_a_planted_fault_is_found(
    plant: Callable[[Patch], None],
    mesh: tuple[int, int],
    shown: set[str],
    unharmed: set[str],
    monkeypatch: Patch,
) -> None:
    plant(monkeypatch)
    report = check_in_process(config(*mesh), ["fp32"], 1)
    assert not report.passed
    assert shown <= failed(report)
    assert not unharmed & failed(report)
    assert "does not compute" in verdict(report)


@pytest.mark.parametrize("mesh", [(2, 1), (3, 3), (4, 2), (4, 1)], ids=str)
def test_without_a_fault_everything_is_within_its_bounds(mesh: tuple[int, int]) -> None:
    report = check_in_process(config(*mesh), ["fp32"], 1)
    assert failed(report) == set()


def test_half_the_gradient_of_one_parameter_is_found_in_bf16(monkeypatch: Patch) -> None:
    original = replica.PlainReplica.gradients

    def halved(self: replica.PlainReplica) -> dict[str, Tensor]:
        found = original(self)
        return found | {"blocks.0.attention.q_proj.weight": found["blocks.0.attention.q_proj.weight"] / 2}

    assert check_in_process(config(2), ["bf16"], 1).passed
    monkeypatch.setattr(replica.PlainReplica, "gradients", halved)
    assert failed(check_in_process(config(2), ["bf16"], 1)) == {"gradients"}
