"""The sections that say how layers know of position, and which kinds of layers there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from roformer_dist.config.section import PositiveInt, Section

if TYPE_CHECKING:
    from roformer_dist.config.model import ModelConfig

LayerKind = Literal["full", "sliding", "linear", "no_position"]
LayerPattern = Annotated[tuple[LayerKind, ...], Field(min_length=1, strict=False)]


class PlainPolicy(Section):
    """One rotation for all distances, as in the paper."""

    kind: Literal["plain"] = "plain"


class RerotatedPolicy(Section):
    """ReRoPE: keys nearer than ``window`` as usual, all others as if they were ``window`` away."""

    kind: Literal["rerope"]
    window: PositiveInt
    """Distance from which on distances are no longer told apart; a quarter to half of the trained length."""


class SelfExtendPolicy(Section):
    """SelfExtend: keys nearer than ``window`` as usual, the others at positions in groups of ``group``."""

    kind: Literal["self_extend"]
    window: PositiveInt
    """Distance from which on positions are grouped; below the trained length."""
    group: Annotated[int, Field(gt=1)]
    """Positions that share a number; contexts up to (trained length - window) * group + window."""


ScorePolicy = Annotated[PlainPolicy | RerotatedPolicy | SelfExtendPolicy, Field(discriminator="kind")]


class RotaryPosition(Section):
    """Queries and keys are rotated, as ``model.rope`` says."""

    kind: Literal["rotary"] = "rotary"


class LearnedPosition(Section):
    """A learned vector for each position, added to the embedding (BERT)."""

    kind: Literal["learned"]
    max_seq_len: PositiveInt
    """Positions that there are vectors for; longer rows are refused."""


class SinusoidalPosition(Section):
    """Sines and cosines of the position, added to the embedding (arXiv 1706.03762)."""

    kind: Literal["sinusoidal"]


class RelativeBiasPosition(Section):
    """A learned number for each head and bucket of distances, added to the scores (T5)."""

    kind: Literal["relative_bias"]
    num_buckets: Annotated[int, Field(ge=4, multiple_of=4)] = 32
    """Buckets of distances, a multiple of 4; half of them for keys after the query if those are visible."""
    max_distance: PositiveInt = 128
    """Distance from which on all share the last bucket."""


class AlibiPosition(Section):
    """A fixed slope of each head times the distance, subtracted from the scores (arXiv 2108.12409)."""

    kind: Literal["alibi"]


class NoPosition(Section):
    """No position anywhere: only the causal mask tells tokens apart (NoPE)."""

    kind: Literal["none"]


Position = Annotated[
    RotaryPosition | LearnedPosition | SinusoidalPosition | RelativeBiasPosition | AlibiPosition | NoPosition,
    Field(discriminator="kind"),
]


def layer_kind(model: ModelConfig, layer: int) -> LayerKind:
    """The kind of block ``layer``: the pattern, repeated."""
    return model.layers[layer % len(model.layers)]


def check_layers(model: ModelConfig) -> None:
    """ValueError unless layer kinds, position and score policy fit each other."""
    kinds, position, policy = set(model.layers), model.position, model.rope.policy
    if len(model.layers) > model.num_layers:
        raise ValueError(
            f"layers names {len(model.layers)} layers and num_layers = {model.num_layers}; shorten the pattern"
        )
    if ("sliding" in kinds) != (model.sliding_window is not None):
        raise ValueError(
            f"layers = {list(model.layers)} and sliding_window = {model.sliding_window}: sliding layers need a "
            "sliding_window, and nothing else reads it"
        )
    in_scores = position.kind in ("rotary", "relative_bias", "alibi")
    if "no_position" in kinds and not in_scores:
        raise ValueError(
            f"layers: no_position cannot be honoured with position.kind = {position.kind!r}, which no layer can "
            "leave out; use full"
        )
    if kinds == {"no_position"} and position.kind in ("relative_bias", "alibi"):
        raise ValueError(
            f"layers has no_position alone, so nothing would read position.kind = {position.kind!r}; set "
            "position.kind = 'none' or add full layers"
        )
    if "linear" in kinds and position.kind in ("relative_bias", "alibi"):
        raise ValueError(
            f"layers: linear has no scores to add position.kind = {position.kind!r} to; use position.kind = "
            "'rotary' or full layers"
        )
    if policy.kind != "plain" and (position.kind != "rotary" or "linear" in kinds):
        raise ValueError(
            f"rope.policy = {policy.kind!r} is about rotated softmax attention; it needs position.kind = 'rotary' "
            "and no linear layers"
        )
    if model.rope.rotary_value and (policy.kind != "plain" or position.kind != "rotary" or "linear" in kinds):
        raise ValueError(
            "rope.rotary_value turns the values of plain rotary softmax attention; with linear layers, another "
            "position or a score policy it has no meaning"
        )
    if isinstance(policy, SelfExtendPolicy) and policy.window < policy.group:
        raise ValueError(
            f"rope.policy: window = {policy.window} is below group = {policy.group}: keys at the window's edge would "
            "seem nearer than those inside"
        )
    if isinstance(position, RelativeBiasPosition) and position.max_distance <= position.num_buckets // 2:
        raise ValueError(
            f"position.max_distance = {position.max_distance} must be greater than half of num_buckets = "
            f"{position.num_buckets}: so many distances have a bucket of their own"
        )
    if position.kind == "sinusoidal" and model.embedding_width % 2:
        raise ValueError(
            f"position.kind = 'sinusoidal' has pairs of sine and cosine; an embedding of {model.embedding_width} is odd"
        )
