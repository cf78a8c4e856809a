"""How a layer's queries meet its keys: one rotation, several merged by lse, a bias, or linear attention.

A layer makes unrotated queries and keys and calls the ``Scores`` of its kind. They are made once a
forward and shared by all layers of a kind.

Shapes: R rows, S tokens, N heads, M key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from roformer_dist.batch import Batch, MaskSpec
from roformer_dist.config.layers import LayerKind, PlainPolicy, RerotatedPolicy, SelfExtendPolicy
from roformer_dist.config.model import ModelConfig
from roformer_dist.kernels.attention import ScoreBias, ScorePart, SequenceOps
from roformer_dist.model.linear_attention import LinearScores
from roformer_dist.model.positions import Positions
from roformer_dist.model.rotary import Phases, Rotary


class Scores(Protocol):
    """What a layer attends with."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ops: SequenceOps) -> Tensor:
        """Attention ``[R, S, N, D]`` of unrotated q ``[R, S, N, D]`` over k and v ``[R, S, M, D]``."""
        ...


@dataclass(frozen=True)
class PlainScores:
    """Softmax attention under one rotation, or none.

    Attributes:
        rotate_values: whether values turn too (``rope.rotary_value``).
    """

    mask: MaskSpec
    phases: Phases | None
    rotate_values: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ops: SequenceOps) -> Tensor:
        """See Scores."""
        if self.phases is not None:
            q, k = self.phases.rotate(q), self.phases.rotate(k)
            v = self.phases.rotate(v) if self.rotate_values else v
        return ops.attend(q, k, v, self.mask, q.shape[-1] ** -0.5)


@dataclass(frozen=True)
class BiasedScores:
    """Softmax attention with a bias that is a function of distance."""

    mask: MaskSpec
    bias: ScoreBias

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ops: SequenceOps) -> Tensor:
        """See Scores."""
        return ops.attend_biased(q, k, v, self.mask, q.shape[-1] ** -0.5, self.bias)


@dataclass(frozen=True)
class Region:
    """Keys in a band of distances, and the rotations that queries and keys have there."""

    mask: MaskSpec
    q_phases: Phases
    k_phases: Phases


@dataclass(frozen=True)
class RegionScores:
    """One softmax over regions that are rotated differently."""

    regions: Sequence[Region]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ops: SequenceOps) -> Tensor:
        """See Scores."""
        parts = [
            ScorePart(region.q_phases.rotate(q), region.k_phases.rotate(k), region.mask)
            for region in self.regions
        ]
        return ops.attend_parts(parts, v, q.shape[-1] ** -0.5)


def far_positions(policy: RerotatedPolicy | SelfExtendPolicy, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of queries and of keys that are at least ``policy.window`` apart.

    ReRoPE: always ``window`` apart. SelfExtend: ``floor(m / G) - floor(n / G) + w - floor(w / G)``, which
    continues at the window's edge where the near positions end.
    """
    if isinstance(policy, RerotatedPolicy):
        keys = torch.zeros_like(position_ids)
        return keys + policy.window, keys
    grouped = position_ids.div(policy.group, rounding_mode="floor")
    return grouped + (policy.window - policy.window // policy.group), grouped


def region_scores(
    policy: RerotatedPolicy | SelfExtendPolicy, rotary: Rotary, near: Phases, batch: Batch, mask: MaskSpec
) -> Scores:
    """Softmax attention inside ``mask`` with keys beyond ``policy.window`` rotated as the policy says."""
    if mask.window is not None and mask.window <= policy.window:
        return PlainScores(mask, near)
    positions, extent = batch.position_ids, batch.extent
    if extent is None and rotary.depends_on_length:
        extent = float(positions.max()) + 1  # that of the row, not of the shorter far positions
    q_far, k_far = (rotary.phases(x, extent) for x in far_positions(policy, positions))
    return RegionScores(
        [
            Region(replace(mask, window=policy.window), near, near),
            Region(replace(mask, min_distance=policy.window), q_far, k_far),
        ]
    )


def layer_scores(
    model: ModelConfig, rotary: Rotary, positions: Positions, batch: Batch
) -> dict[LayerKind, Scores]:
    """The Scores of each kind of layer that ``model`` has, for one batch."""
    bias = positions.score_bias(batch.position_ids, causal=batch.mask.causal)
    phases = rotary.phases(batch.position_ids, batch.extent) if model.position.kind == "rotary" else None
    policy = model.rope.policy

    def softmax(mask: MaskSpec) -> Scores:
        if bias is not None:
            return BiasedScores(mask, bias)
        if phases is None or isinstance(policy, PlainPolicy):
            return PlainScores(mask, phases, model.rope.rotary_value)
        return region_scores(policy, rotary, phases, batch, mask)

    def make(kind: LayerKind) -> Scores:
        match kind:
            case "full":
                return softmax(batch.mask)
            case "sliding":
                return softmax(replace(batch.mask, window=model.sliding_window))
            case "no_position":
                return PlainScores(batch.mask, None)
            case "linear":
                return LinearScores(batch.mask, phases, model.linear_features)

    return {kind: make(kind) for kind in model.layers}
