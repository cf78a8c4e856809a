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
from roformer_dist.interop.settings import LARGEST, HuggingFaceError, flag, number, shown, whole_number


class _Parameters:
    """``rope_parameters``, taken key by key."""

    def __init__(self, parameters: object, source: str) -> None:
        if not isinstance(parameters, dict):
            raise HuggingFaceError(f"{source}: rope_parameters = {shown(parameters)} is not a table of keys")
        self._source = source
        self.left = {key: value for key, value in parameters.items() if value is not None}

    def number(self, key: str, default: float | None = None) -> float:
        return number(self._take(key, default), self._name(key))

    def numbers(self, key: str) -> list[float]:
        values = self._take(key)
        if not isinstance(values, list):
            raise HuggingFaceError(f"{self._name(key)} = {shown(values)} is not a list of numbers")
        return [number(value, self._name(key)) for value in values]

    def length(self, key: str, default: int) -> int:
        return whole_number(self._take(key, default), self._name(key), LARGEST["max_position_embeddings"])

    def flag(self, key: str, default: bool) -> bool:
        return flag(self._take(key, default), self._name(key))

    def has(self, key: str) -> bool:
        return key in self.left

    def _take(self, key: str, default: object = None) -> object:
        value = self.left.pop(key, default)
        if value is None:
            raise HuggingFaceError(f"{self._name(key)} is missing")
        return value

    def _name(self, key: str) -> str:
        return f"{self._source}: rope_parameters.{key}"


def read_rope(parameters: object, *, trained: int, source: str) -> dict[str, Any]:
    """Our rope section, as values, from ``rope_parameters``.

    Args:
        trained: ``max_position_embeddings``, which the rules fall back to.

    Raises:
        HuggingFaceError: a type, a key or a value that is not known here.
    """
    taken = _Parameters(parameters, source)
    kind = taken.left.pop("rope_type", taken.left.pop("type", "default"))
    taken.left.pop("type", None)
    rope: dict[str, Any] = {
        "theta": taken.number("rope_theta"),
        "partial": taken.number("partial_rotary_factor", 1.0),
    }
    original = taken.length("original_max_position_embeddings", trained)
    stretched = trained / original
    match kind:
        case "default":
            rope["scaling"] = {"kind": "none"}
        case "linear":
            rope["scaling"] = {"kind": "linear", "factor": taken.number("factor")}
        case "dynamic":
            rope["scaling"] = {
                "kind": "dynamic",
                "factor": taken.number("factor"),
                "original_seq_len": trained,
            }
        case "yarn":
            rope["scaling"] = _read_yarn(taken, original, stretched)
        case "longrope":
            rope["scaling"] = _read_longrope(taken, original, stretched)
        case "llama3":
            numbers = {key: taken.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
            rope["scaling"] = {"kind": "llama3", "original_seq_len": original, **numbers}
        case _:
            raise HuggingFaceError(
                f"{source}: rope_type = {shown(kind)} is not one of default, linear, dynamic, yarn, longrope, llama3"
            )
    if taken.left:
        key = sorted(taken.left)[0]
        raise HuggingFaceError(
            f"{source}: rope_parameters.{key} = {shown(taken.left[key])} is not understood with {kind!r}"
        )
    return rope


def _read_yarn(taken: _Parameters, original: int, stretched: float) -> dict[str, Any]:
    yarn: dict[str, Any] = {
        "kind": "yarn",
        "factor": taken.number("factor", stretched),
        "original_seq_len": original,
        # Zeros mean the defaults there.
        "beta_fast": taken.number("beta_fast", 0) or 32.0,
        "beta_slow": taken.number("beta_slow", 0) or 1.0,
        "truncate": taken.flag("truncate", True),
    }
    mscales = {key: taken.number(key, 0) for key in ("mscale", "mscale_all_dim")}
    if taken.has("attention_factor"):
        yarn["attention_factor"] = taken.number("attention_factor")
    elif all(mscales.values()):
        yarn |= mscales
    return yarn


def _read_longrope(taken: _Parameters, original: int, stretched: float) -> dict[str, Any]:
    longrope: dict[str, Any] = {"kind": "longrope", "original_seq_len": original}
    longrope |= {key: taken.numbers(key) for key in ("short_factor", "long_factor")}
    factor = taken.number("factor", stretched)
    if taken.has("attention_factor"):
        return longrope | {"attention_factor": taken.number("attention_factor")}
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
