"""Strict TOML in, one clear line out: reading, overriding and writing a configuration."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

from roformer_dist.config.schema import Config, Description

Parsed = TypeVar("Parsed", bound=BaseModel)
_SHOWN = 200  # characters of a key or a value that an error repeats


class ConfigError(ValueError):
    """A configuration that cannot be honoured; the message is one line with key, value and fix.

    Whatever stands in keys, values and file names, the line can be printed: a line break, a terminal's
    escape or half a surrogate pair is written as its escape.
    """

    def __init__(self, message: str) -> None:
        shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__("".join(shown))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply ``section.key=value`` overrides, validate.

    Raises:
        ConfigError: one line naming the file, the key, the value and what would fit.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not only TOMLDecodeError: 5,000 digits are no integer
        raise ConfigError(f"{path}: not valid TOML: {_one_line(error)}") from None
    return parse_config(apply_overrides(values, overrides), source=str(path))


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of a nested dictionary with ``section.key=value`` changes.

    Raises:
        ConfigError: an override that is not of that form.
    """
    changed = copy.deepcopy(values)
    for override in overrides:
        _apply(changed, override)
    return changed


def parse_config(values: dict[str, Any], *, source: str) -> Config:
    """Validate a nested dictionary; ConfigError names ``source``."""
    return _validated(Config, values, source)


def parse_description(values: dict[str, Any], *, source: str) -> Description:
    """The sections of a checkpoint that holds parameters alone; ConfigError names ``source``."""
    return _validated(Description, values, source)


def _validated(kind: type[Parsed], values: dict[str, Any], source: str) -> Parsed:
    _check_integers(values, source)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_describe(error)}") from None


def dump_config(config: Config) -> str:
    """The resolved configuration as TOML text; loading it gives an equal configuration."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def config_hash(config: Config) -> str:
    """sha256 over the resolved values, independent of key order."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set {override!r}: write section.key=value")
    section = values
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override!r}: {part} is a value, not a section")
    section[parts[-1]] = _toml_value(text.strip())


def _toml_value(text: str) -> Any:
    """``text`` as a TOML value; a bare word is a string, so that shells need no second quoting."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _describe(error: ValidationError) -> str:
    first, *others = error.errors()
    path = [str(part) for part in first["loc"]]
    # A discriminated union puts the chosen alternative's tag into the location; it is not a key.
    where = _short(".".join(_without_tags(path)))
    kind = first["type"]
    if kind == "extra_forbidden":
        message = f"{where}: unknown key{_suggestion(path)}"
    elif kind == "missing":
        message = f"{where}: this key is required"
    elif kind == "value_error":
        reason = first.get("ctx", {}).get("error", first["msg"])
        message = f"{where}: {reason}" if where else str(reason)
    else:
        message = f"{where} = {_shown(first['input'])}: {_short(first['msg'])}"
    return message + (f" (and {len(others)} more)" if others else "")


def _check_integers(values: dict[str, Any], source: str) -> None:
    """Refuse what TOML calls an error and Python's reader takes: integers that 64 bits do not hold.

    Nothing here could use one, and Python cannot even print those beyond 4,300 digits.
    """
    inside: list[tuple[str, Any]] = [("", values)]  # a list and no recursion: nesting may be deep
    while inside:
        where, value = inside.pop()
        if isinstance(value, dict):
            inside += [(f"{where}.{key}" if where else str(key), item) for key, item in value.items()]
        elif isinstance(value, list):
            inside += [(where, item) for item in value]
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(f"{source}: {_short(where)}: an integer beyond 64 bits; write a smaller one")


def _shown(value: object) -> str:
    try:
        return _short(repr(value))
    except RecursionError:  # dotted keys nest as deep as a line is long
        return "(deeply nested)"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}... ({len(text)} characters)"


def _walk(path: Sequence[str]) -> tuple[type[BaseModel] | None, list[str]]:
    """Follow an error location through the schema; the section it ends in and the real keys."""
    section: type[BaseModel] | None = Config
    keys: list[str] = []
    alternatives: list[type[BaseModel]] = []
    for part in path:
        tagged = [a for a in alternatives if _tag(a) == part]
        if tagged:
            section, alternatives = tagged[0], []
            continue
        keys.append(part)
        if part.isdecimal():  # a place in a list of sections
            continue
        field = section.model_fields.get(part) if section else None
        found = sections_in(field.annotation) if field else []
        alternatives = found if len(found) > 1 else []
        section = found[0] if len(found) == 1 else section if not field else None
    return section, keys


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a key may hold: none, one (alone, or each of a list), or the alternatives of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in get_args(annotation) for section in sections_in(inner)]


def _tag(section: type[BaseModel]) -> str | None:
    kind = section.model_fields.get("kind")
    return get_args(kind.annotation)[0] if kind else None


def _without_tags(path: Sequence[str]) -> list[str]:
    return _walk(path)[1]


def _suggestion(path: Sequence[str]) -> str:
    section, _ = _walk(path[:-1])
    known = list(section.model_fields) if section else []
    close = difflib.get_close_matches(path[-1], known, n=1)
    if close:
        return f" (did you mean {close[0]}?)"
    return f" (known: {', '.join(known)})" if known else ""


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
