"""How a layer's queries meet its keys: one rotation, several merged by lse, a bias, or linear attention.

A layer makes unrotated queries and keys and calls the ``Scores`` of its kind. They are made once a
forward and shared by all layers of a kind. Keys may be others than those of the queries' tokens: a cache's.

Shapes: R rows, S tokens, U tokens of the keys (S without a cache), N heads, M key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
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
        """Attention ``[R, S, N, D]`` of unrotated q ``[R, S, N, D]`` over k and v ``[R, U, M, D]``."""
        ...


@dataclass(frozen=True)
class Side:
    """The queries or the keys of an attention: where they stand, and how they turn there.

    Attributes:
        position_ids: ``[R, S]`` or ``[R, U]``.
        turn: phases of these tokens at any positions of the same shape; None: they do not turn.
    """

    position_ids: Tensor
    turn: Callable[[Tensor], Phases] | None

    @cached_property
    def phases(self) -> Phases | None:
        """The rotation to where the tokens stand."""
        return None if self.turn is None else self.turn(self.position_ids)

    def at(self, position_ids: Tensor) -> Phases:
        """The rotation to other positions."""
        assert self.turn is not None, "positions are not rotary"
        return self.turn(position_ids)


@dataclass(frozen=True)
class PlainScores:
    """Softmax attention under one rotation, or none.

    Attributes:
        rotate_values: whether values turn too (``rope.rotary_value``).
    """

    mask: MaskSpec
    q_phases: Phases | None = None
    k_phases: Phases | None = None
    rotate_values: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ops: SequenceOps) -> Tensor:
        """See Scores."""
        if self.q_phases is not None and self.k_phases is not None:
            q, k = self.q_phases.rotate(q), self.k_phases.rotate(k)
            v = self.k_phases.rotate(v) if self.rotate_values else v
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
    policy: RerotatedPolicy | SelfExtendPolicy, mask: MaskSpec, queries: Side, keys: Side
) -> Scores:
    """Softmax attention inside ``mask`` with keys beyond ``policy.window`` rotated as the policy says."""
    near_q, near_k = queries.phases, keys.phases
    assert near_q is not None
    assert near_k is not None
    if mask.window is not None and mask.window <= policy.window:
        return PlainScores(mask, near_q, near_k)
    far_q, far_k = far_positions(policy, queries.position_ids)[0], far_positions(policy, keys.position_ids)[1]
    return RegionScores(
        [
            Region(replace(mask, window=policy.window), near_q, near_k),
            Region(replace(mask, min_distance=policy.window), queries.at(far_q), keys.at(far_k)),
        ]
    )


def softmax_scores(
    model: ModelConfig, mask: MaskSpec, queries: Side, keys: Side, bias: ScoreBias | None
) -> Scores:
    """How a layer that knows positions attends inside ``mask``."""
    if bias is not None:
        return BiasedScores(mask, bias)
    policy = model.rope.policy
    if queries.turn is None or isinstance(policy, PlainPolicy):
        return PlainScores(mask, queries.phases, keys.phases, model.rope.rotary_value)
    return region_scores(policy, mask, queries, keys)


def layer_scores(
    model: ModelConfig, rotary: Rotary, positions: Positions, batch: Batch
) -> dict[LayerKind, Scores]:
    """The Scores of each kind of layer that ``model`` has, for one batch."""
    bias = positions.score_bias(batch.position_ids, batch.position_ids, causal=batch.mask.causal)
    turn = None
    if model.position.kind == "rotary":
        extent = batch.extent
        if extent is None and rotary.depends_on_length:
            extent = float(batch.position_ids.max()) + 1  # also that of a policy's shorter far positions
        turn = partial(rotary.phases, length=extent)
    tokens = Side(batch.position_ids, turn)

    def make(kind: LayerKind) -> Scores:
        match kind:
            case "full":
                return softmax_scores(model, batch.mask, tokens, tokens, bias)
            case "sliding":
                mask = replace(batch.mask, window=model.sliding_window)
                return softmax_scores(model, mask, tokens, tokens, bias)
            case "no_position":
                return PlainScores(batch.mask)
            case "linear":
                return LinearScores(batch.mask, tokens.phases, model.linear_features)

    return {kind: make(kind) for kind in model.layers}
