"""The configuration as Markdown, from the schema and its docstrings. Pure.

python -m roformer_dist.config.document > docs/configuration.md
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from roformer_dist.config.load import sections_in
from roformer_dist.config.schema import Config

INTRODUCTION = """\
# Configuration

This page is generated from the schema in `roformer_dist/config/`; do not edit it. After a change there:

    python -m roformer_dist.config.document > docs/configuration.md

A configuration is a TOML file; `configs/` has some. Nothing is coerced (`1.0` is no integer, `"1e-3"` no number),
integers have 64 bits, and an unknown key is an error, each in one line with what would fit. Every key can be
overridden on the command line, the value in TOML's own notation or as a bare word:
`--set train.seq_len=8192 --set train.precision=bf16`.

Sizes of the mesh and gradient accumulation are derived, not set: `dp_size` is the number of processes over
`parallel.sp_size`, and `train.tokens_per_step` is spread over the replicas in micro-batches.

A section with a `kind` is one of several; its other keys depend on the `kind`.
"""


def markdown() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## Top level\n", _table(Config)]
    for path, section in _sections(Config, ""):
        tag = _tag(section)
        parts += [
            f"## `[{path}]`" + (f", kind = {tag}\n" if tag else "\n"),
            f"{_one_line(section.__doc__)}\n",
            _table(section),
        ]
    return "\n".join(parts)


def _sections(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section below ``section`` with its dotted path, in the order of the schema."""
    for name, field in section.model_fields.items():
        for inner in sections_in(field.annotation):
            yield (f"[{prefix}{name}]" if _is_list(field.annotation) else prefix + name), inner
            yield from _sections(inner, f"{prefix}{name}.")


def _table(section: type[BaseModel]) -> str:
    """A row for each key; empty for a section of nothing but its kind."""
    rows = [_row(name, field) for name, field in section.model_fields.items() if name != "kind"]
    if not rows:
        return "No further keys.\n"
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _row(name: str, field: FieldInfo) -> str:
    models = sections_in(field.annotation)
    if len(models) > 1:
        kinds = " or ".join(f"`{_tag(model)}`" for model in models)
        kind, meaning = f"section of kind {kinds}", field.description or "One of the alternatives below."
    elif models:
        kind = "list of sections" if _is_list(field.annotation) else "section"
        meaning = field.description or models[0].__doc__
    else:
        kind, meaning = _type(field.annotation, field.metadata), field.description
    cells = (f"`{name}`", kind, _default(field), _one_line(meaning))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _tag(section: type[BaseModel]) -> str:
    """The ``kind`` that chooses this section, as TOML writes it; empty where there is no choice."""
    kind = section.model_fields.get("kind")
    return json.dumps(get_args(kind.annotation)[0]) if kind else ""


def _type(annotation: Any, metadata: list[Any]) -> str:
    """A type and its bounds in words."""
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        return "list of " + ", ".join(
            _type(*_unpack(inner)) for inner in get_args(annotation) if inner is not ...
        )
    if _is_union(annotation):
        return _type(*_unpack(get_args(annotation)[0]))  # X | None: TOML has no null, a key is left out
    words = {bool: "true or false", int: "integer", float: "number", str: "text"}[annotation]
    bounds = [text for constraint in metadata for text in _bounds(constraint)]
    return " ".join([words, " and ".join(bounds)]) if bounds else words


def _bounds(constraint: Any) -> list[str]:
    """What one constraint of a field says, as comparisons."""
    match constraint:
        case annotated_types.Gt(gt=bound):
            return [f"> {bound}"]
        case annotated_types.Ge(ge=bound):
            return [f"≥ {bound}"]
        case annotated_types.Lt(lt=bound):
            return [f"< {bound}"]
        case annotated_types.Le(le=bound):
            return [f"≤ {bound}"]
    pattern = getattr(constraint, "pattern", None)
    return [f"matching `{pattern}`"] if pattern else []


def _unpack(annotation: Any) -> tuple[Any, list[Any]]:
    """An ``Annotated`` type and the constraints in it."""
    if not hasattr(annotation, "__metadata__"):
        return annotation, []
    inner, *annotations = get_args(annotation)
    found = [a for a in annotations if not isinstance(a, FieldInfo)]
    return inner, found + [m for a in annotations if isinstance(a, FieldInfo) for m in a.metadata]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "see meaning"
    if isinstance(value, BaseModel):
        tag = _tag(type(value))
        return f"kind `{tag}`" if tag else "its defaults"
    return f"`{json.dumps(value)}`"


def _is_list(annotation: Any) -> bool:
    """Whether a key holds a list of sections, or may."""
    return get_origin(annotation) is tuple or any(_is_list(inner) for inner in get_args(annotation))


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    sys.stdout.buffer.write(markdown().encode())  # UTF-8 in any locale
