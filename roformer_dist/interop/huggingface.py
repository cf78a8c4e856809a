"""Which family a model is of, and what its ``config.json`` says, both ways."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from roformer_dist.config.data import Objective
from roformer_dist.config.model import ModelConfig
from roformer_dist.config.schema import check_embedding
from roformer_dist.interop.family import Description, Family
from roformer_dist.interop.files import INSTALL
from roformer_dist.interop.gpt_neox import GptNeoxFamily
from roformer_dist.interop.llama import LlamaFamily
from roformer_dist.interop.roformer import KINDS, RoFormerFamily
from roformer_dist.interop.settings import TOKEN_IDS, HuggingFaceError, Settings, check_sizes, shown

FAMILIES: tuple[Family, ...] = (
    RoFormerFamily(),
    LlamaFamily("Llama", "llama", mlp_bias=True),
    LlamaFamily("Qwen3", "qwen3", qk_norm=True),
    LlamaFamily("Qwen2", "qwen2", attention_bias=("qkv",), free_head_dim=False),
    GptNeoxFamily(),
)
GENERATION = "generation_config.json"
# Old names of keys, which transformers' configuration classes turn into those of today.
_RENAMED = {
    "rope_theta",
    "rope_scaling",
    "rotary_pct",
    "rotary_emb_base",
    "partial_rotary_factor",
    "num_labels",
}


@dataclass(frozen=True)
class Read:
    """A ``config.json`` understood.

    Attributes:
        family: whose it is.
        description: our sections.
        token_ids: ``bos_token_id`` and the like, as they stand there; ``eos_token_id``, a number or several, is that
            of the ``generation_config.json`` beside it, if there is one: ``generate`` goes by that alone.
    """

    family: Family
    description: Description
    token_ids: dict[str, Any]


def require_transformers() -> Any:
    """The transformers package, quiet.

    Raises:
        HuggingFaceError: it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise HuggingFaceError(f"this command needs transformers: {INSTALL}") from None
    transformers.utils.logging.set_verbosity_error()
    return transformers


def read_config(path: Path, ignore: Collection[str] = ()) -> Read:
    """What a ``config.json`` says, in our words.

    Args:
        ignore: keys that the user says do not change what the model computes.

    Raises:
        HuggingFaceError: a family, an architecture, a key or a value that cannot be carried over.
    """
    transformers = require_transformers()
    raw = _read_json(path)
    family = _family_of(raw, str(path))
    architecture = _architecture_of(raw, family, str(path))
    check_sizes(raw, str(path))
    config_class = transformers.CONFIG_MAPPING[family.model_type]
    try:
        config = config_class.from_dict(dict(raw))
        blank = config_class().to_dict()
        if "rope_parameters" in blank:
            config.standardize_rope_params()  # as a model does: a length beside them goes before the one in them
    except Exception as error:  # whatever its validation raises
        raise HuggingFaceError(f"{path}: transformers refuses it: {' '.join(str(error).split())}") from None
    values = {**config.to_dict(), "num_labels": config.num_labels}
    for key in _RENAMED - blank.keys() - {"rope_theta"}:
        values.pop(key, None)
    if "original_max_position_embeddings" in (values.get("rope_parameters") or {}):
        values.pop("original_max_position_embeddings", None)
    settings = Settings(values, str(path))
    check_sizes(values, str(path))
    trained = settings.peek("max_position_embeddings")
    model, objective = family.read(settings, architecture, config.num_labels)
    settings.take("max_position_embeddings")
    settings.finish(ignore)
    notes = tuple(settings.notes)
    token_ids = {key: raw.get(key) for key in TOKEN_IDS} | {"eos_token_id": _stop_ids(raw, path)}
    return Read(family, _describe(model, objective, trained, notes, str(path)), token_ids)


def _stop_ids(raw: dict[str, Any], path: Path) -> int | list[int] | None:
    """What ``generate`` of transformers stops at; it reads no id of config.json where there is the other file."""
    generation = path.with_name(GENERATION)
    if generation.is_file():
        raw, path = _read_json(generation), generation
    ids = raw.get("eos_token_id")
    listed = ids if isinstance(ids, list) else [0 if ids is None else ids]
    if not listed or not all(type(i) is int for i in listed):
        raise HuggingFaceError(
            f"{path}: eos_token_id = {shown(ids)} must be a token's number, or a list of them"
        )
    return ids


def _describe(
    model: dict[str, Any], objective: dict[str, Any], trained: int, notes: tuple[str, ...], source: str
) -> Description:
    section = "model"
    try:
        ours = ModelConfig.model_validate(model)
        section = "objective"
        wanted: Objective = TypeAdapter(Objective).validate_python(objective)
        check_embedding(ours, wanted)
    except ValidationError as error:
        first = error.errors()[0]
        # The first part of an objective's is its kind.
        where = ".".join([section, *(str(part) for part in first["loc"][section == "objective" :])])
        # A section as a whole is refused for what its message says.
        value = "" if isinstance(first["input"], dict) else f" {shown(first['input'])}"
        raise HuggingFaceError(f"{source}: our {where} refuses{value}: {first['msg']}") from None
    except ValueError as error:
        raise HuggingFaceError(f"{source}: {error}") from None
    return Description(ours, wanted, trained, notes)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HuggingFaceError(f"{path}: no such file; give the folder of a Hugging Face model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise HuggingFaceError(f"{path}: not a JSON file: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise HuggingFaceError(f"{path}: not a configuration")
    return values


def _family_of(raw: dict[str, Any], source: str) -> Family:
    for family in FAMILIES:
        if raw.get("model_type") == family.model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise HuggingFaceError(f"{source}: model_type = {shown(raw.get('model_type'))} is not one of {known}")


def _architecture_of(raw: dict[str, Any], family: Family, source: str) -> str:
    known = list(KINDS) if isinstance(family, RoFormerFamily) else [f"{family.name}ForCausalLM"]
    named = raw.get("architectures") or []
    for architecture in known:
        if named == [architecture]:
            return architecture
    raise HuggingFaceError(f"{source}: architectures = {shown(named)} is not one of {', '.join(known)}")


def choose_family(model: ModelConfig, objective: Objective) -> Family:
    """The architecture that expresses this model.

    Raises:
        HuggingFaceError: none does; the nearest one is named, with everything it lacks.
    """
    lacking = {family.name: family.mismatches(model, objective) for family in FAMILIES}
    for family in FAMILIES:
        if not lacking[family.name]:
            return family
    nearest = min(lacking, key=lambda name: len(lacking[name]))
    raise HuggingFaceError(
        f"no Hugging Face architecture known here computes what this model does; the nearest is {nearest}, which "
        f"cannot have {'; nor '.join(lacking[nearest])}"
    )


def write_config(family: Family, values: dict[str, Any], token_ids: dict[str, Any], folder: Path) -> None:
    """Write ``config.json``, through transformers' own class."""
    transformers = require_transformers()
    config_class = transformers.CONFIG_MAPPING[family.model_type]
    # transformers' defaults for these ids are those of its own models.
    ids = {key: token_ids.get(key) for key in TOKEN_IDS}
    config_class(**values, **ids).save_pretrained(folder)
