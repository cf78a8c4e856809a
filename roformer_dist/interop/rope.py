"""Hugging Face's ``rope_parameters`` and our rope section, both ways."""

from __future__ import annotations

import math
from typing import Any

from roformer_dist.config.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NoScaling,
    NtkScaling,
    RopeConfig,
    YarnScaling,
)
from roformer_dist.interop.settings import HuggingFaceError


def read_rope(parameters: dict[str, Any], *, trained: int, source: str) -> dict[str, Any]:
    """Our rope section, as values, from ``rope_parameters``.

    Args:
        trained: ``max_position_embeddings``, which the rules fall back to.

    Raises:
        HuggingFaceError: a type or a key that is not known here.
    """
    left = {key: value for key, value in parameters.items() if value is not None}
    kind = left.pop("rope_type", left.pop("type", "default"))
    left.pop("type", None)
    rope: dict[str, Any] = {
        "theta": float(left.pop("rope_theta")),
        "partial": float(left.pop("partial_rotary_factor", 1.0)),
    }
    original = left.pop("original_max_position_embeddings", trained)
    stretched = trained / original
    match kind:
        case "default":
            rope["scaling"] = {"kind": "none"}
        case "linear":
            rope["scaling"] = {"kind": "linear", "factor": _number(left, "factor", source)}
        case "dynamic":
            factor = _number(left, "factor", source)
            rope["scaling"] = {"kind": "dynamic", "factor": factor, "original_seq_len": trained}
        case "yarn":
            rope["scaling"] = _read_yarn(left, original, stretched)
        case "longrope":
            rope["scaling"] = _read_longrope(left, original, stretched)
        case "llama3":
            numbers = {
                key: _number(left, key, source) for key in ("factor", "low_freq_factor", "high_freq_factor")
            }
            rope["scaling"] = {"kind": "llama3", "original_seq_len": original, **numbers}
        case _:
            raise HuggingFaceError(
                f"{source}: rope_type = {kind!r} is not one of default, linear, dynamic, yarn, longrope, llama3"
            )
    if left:
        key = sorted(left)[0]
        raise HuggingFaceError(
            f"{source}: rope_parameters.{key} = {left[key]!r} is not understood with {kind!r}"
        )
    return rope


def _number(left: dict[str, Any], key: str, source: str) -> float:
    if key not in left:
        raise HuggingFaceError(f"{source}: rope_parameters.{key} is missing")
    return float(left.pop(key))


def _read_yarn(left: dict[str, Any], original: int, stretched: float) -> dict[str, Any]:
    yarn: dict[str, Any] = {
        "kind": "yarn",
        "factor": float(left.pop("factor", stretched)),
        "original_seq_len": original,
        # Zeros mean the defaults there.
        "beta_fast": float(left.pop("beta_fast", 0) or 32),
        "beta_slow": float(left.pop("beta_slow", 0) or 1),
        "truncate": bool(left.pop("truncate", True)),
    }
    mscales = {key: float(left.pop(key, 0)) for key in ("mscale", "mscale_all_dim")}
    if "attention_factor" in left:
        yarn["attention_factor"] = float(left.pop("attention_factor"))
    elif all(mscales.values()):
        yarn |= mscales
    return yarn


def _read_longrope(left: dict[str, Any], original: int, stretched: float) -> dict[str, Any]:
    longrope: dict[str, Any] = {"kind": "longrope", "original_seq_len": original}
    longrope |= {key: [float(x) for x in left.pop(key, ())] for key in ("short_factor", "long_factor")}
    factor = float(left.pop("factor", stretched))
    if "attention_factor" in left:
        return longrope | {"attention_factor": float(left.pop("attention_factor"))}
    return longrope | {"factor": factor}


def write_rope(rope: RopeConfig, head_dim: int, trained: int) -> dict[str, Any]:
    """``rope_parameters`` of ``rope``; ``trained`` is the ``max_position_embeddings`` beside it.

    Raises:
        HuggingFaceError: dynamic scaling, where transformers goes by another length than ours.
    """
    parameters: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": rope.scaling.kind}
    match rope.scaling:
        case NoScaling():
            parameters["rope_type"] = "default"
        case NtkScaling(factor=factor):
            # There is no such type: it is another base.
            dim = rope.rotary_dim(head_dim)
            parameters |= {"rope_type": "default", "rope_theta": rope.theta * factor ** (dim / (dim - 2))}
        case LinearScaling(factor=factor):
            parameters["factor"] = factor
        case DynamicScaling() as dynamic:
            if dynamic.original_seq_len != trained:
                raise HuggingFaceError(
                    f"--max-position-embeddings {trained}: transformers takes it for the trained length of dynamic "
                    f"scaling, which is {dynamic.original_seq_len} here; leave the option out"
                )
            parameters["factor"] = dynamic.factor
        case YarnScaling() | LongRopeScaling() | Llama3Scaling() as scaling:
            values = scaling.model_dump(mode="json", exclude={"kind", "original_seq_len"}, exclude_none=True)
            parameters |= {**values, "original_max_position_embeddings": scaling.original_seq_len}
    return parameters


def check_table(rope: RopeConfig) -> str | None:
    """Why a table of cos and sin cannot stand for ``rope``; None if it can."""
    if isinstance(rope.scaling, DynamicScaling | LongRopeScaling):
        return f"rope.scaling {rope.scaling.kind!r} depends on the length, and RoFormer's table is fixed"
    if not math.isclose(rope.partial, 1.0):
        return f"rope.partial = {rope.partial}: RoFormer turns whole heads"
    return None
