"""Anything at all, as a configuration: it loads, or it is one line that says what is wrong.

Every recipe is mutated 1,200 times as a nested dictionary and 300 times as text, from fixed seeds.
"""

from __future__ import annotations

import copy
import json
import math
import random
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import roformer_dist
from roformer_dist.config import Config, ConfigError, derive, dump_config, load_config, parse_config

RECIPES = sorted((Path(roformer_dist.__file__).parent.parent / "configs").glob("*.toml"))
AS_VALUES, AS_TEXT = 1200, 300

LINE_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
WORDS = [
    "cosine", "wsd", "inverse_sqrt", "masked", "causal", "none", "linear", "ntk", "yarn", "kind", "factor",
    "train", "model", "shards", "warmup_steps", "mask_id", "original_seq_len", "beta_fast", "", " ", "a.b",
    "__class__", "model_config", "x\ny", "x\u2028y", "\x00", "\ud83d", "é", "名", "🙂", "\u202eab", "'", '"', "#", "{}",
    "%s", "[x]", "1e-3", "true", "null", "A" * 300,
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 3, 7, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400, 1 << 20_000, 0.0, -0.0, 0.5, 1.0, 1.5, -1e-3,
    1e-320, 5e-324, 1e308, 1.7976931348623157e308, math.nan, math.inf, -math.inf,
]  # fmt: skip


def garbage(rng: random.Random, depth: int = 3) -> Any:
    """A value of any type, nested or not."""
    choice = rng.randrange(8 if depth else 6)
    if choice < 2:
        return rng.choice(NUMBERS)
    if choice < 4:
        return rng.choice(WORDS)
    if choice == 4:
        return rng.choice([True, False, None])
    if choice == 5:
        return rng.choice([{}, [], [[]], {"kind": rng.choice(WORDS)}, {"kind": {}}, {"kind": None}])
    if choice == 6:
        return [garbage(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(WORDS): garbage(rng, depth - 1) for _ in range(rng.randrange(4))}


def places(values: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Every key at every depth, as the dictionary that holds it and its name."""
    found = []
    for key, value in values.items():
        found.append((values, key))
        if isinstance(value, dict):
            found += places(value)
    return found


def retyped(value: Any) -> Any:
    """The same value as another type."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return float(value) if abs(value) < 2**53 else str(value)
    if isinstance(value, float):
        return str(value)
    if isinstance(value, str):
        return [value]
    return json.dumps(value) if isinstance(value, dict) else {"values": value}


def misspelt(rng: random.Random, key: str) -> str:
    """A key with a letter dropped, doubled, turned or strange."""
    at = rng.randrange(len(key)) if key else 0
    strange = rng.choice([*LINE_BREAKS, "é", "\x00", "\ud83d", "🙂", ".", " "])
    return rng.choice(
        [
            key[:at] + key[at + 1 :],
            key[:at] + key[at : at + 1] + key[at:],
            key.upper(),
            key[::-1],
            key + strange,
        ]
    )


def mutate(rng: random.Random, values: dict[str, Any]) -> None:
    """One mutation, in place."""
    all_places = places(values)
    if not all_places:
        values[rng.choice(WORDS)] = garbage(rng)
        return
    (section, key), (other, other_key) = rng.choice(all_places), rng.choice(all_places)
    match rng.randrange(9):
        case 0:
            del section[key]
        case 1:
            section[misspelt(rng, key)] = section.pop(key)
        case 2:
            section[key] = retyped(section[key])
        case 3:
            section[key] = rng.choice(NUMBERS)
        case 4:
            # Copies: swapping a section with what it holds must not make a dictionary that holds itself.
            one, two = copy.deepcopy(section[key]), copy.deepcopy(other[other_key])
            section[key], other[other_key] = two, one
        case 5:
            section[key] = garbage(rng)
        case 6:
            section[rng.choice(WORDS)] = garbage(rng)
        case 7:
            section[key] = {}
        case 8:
            section[key] = {key: section[key]}


def loaded_or_one_line(load: Callable[[], Config], source: str) -> Config | None:
    """The configuration, or None after a ConfigError that is a line; anything else is a failure."""
    try:
        return load()
    except ConfigError as error:
        line = str(error)
    assert line.startswith(f"{source}: ")
    assert len(line.splitlines()) == 1, repr(line)
    assert len(line) > len(source) + 5
    # A message ends in a terminal or a log, which take neither half a surrogate pair nor control characters.
    line.encode("utf-8")
    assert line.isprintable(), repr(line)
    assert len(line) < 2000, f"{len(line)} characters"
    return None


def check_loaded(config: Config) -> None:
    """What loads can be written down, read again and fitted to processes, or says why not."""
    assert parse_config(tomllib.loads(dump_config(config)), source="again") == config
    rows = config.train.tokens_per_step // config.train.seq_len
    if rows % config.train.micro_batch_size:
        with pytest.raises(ValueError, match=r"^[^\n]* tokens would fit$"):
            derive(config, config.parallel.sp_size)
    else:
        assert derive(config, config.parallel.sp_size).rows_per_step == rows


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_mutated_values_load_or_are_one_line(recipe: Path) -> None:
    original = tomllib.loads(recipe.read_text(encoding="utf-8"))
    outcomes = {True: 0, False: 0}
    for seed in range(AS_VALUES):
        rng = random.Random(f"{recipe.stem}/{seed}")
        values = copy.deepcopy(original)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            mutate(rng, values)
        config = loaded_or_one_line(lambda values=values: parse_config(values, source="fuzz"), "fuzz")
        outcomes[config is not None] += 1
        if config:
            check_loaded(config)
    # Both happen often enough that neither half of the promise is empty.
    assert min(outcomes.values()) > AS_VALUES // 50, outcomes


def mutate_text(rng: random.Random, text: str) -> str:
    """One mutation of a TOML file: lines, characters, brackets."""
    lines = text.splitlines()
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    letter = rng.randrange(len(text))
    strange = rng.choice(
        [
            *LINE_BREAKS,
            *"[]{}=\"'#.,\\",
            "\x00",
            "é",
            "🙂",
            "\ufeff",
            "nan",
            "'''",
            "1" * 5000,
            "0x" + "f" * 5000,
        ]
    )
    match rng.randrange(7):
        case 0:
            del lines[at]
        case 1:
            lines.insert(other, lines[at])
        case 2:
            lines[at], lines[other] = lines[other], lines[at]
        case 3:
            lines = [line for line in lines if not line.startswith("[")]
        case 4:
            return text[:letter] + strange + text[letter:]
        case 5:
            return text[:letter]
        case 6:
            return text[:letter] + text[letter + rng.randrange(1, 40) :]
    return "\n".join(lines)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_mutated_text_loads_or_is_one_line(recipe: Path, tmp_path: Path) -> None:
    # Without comments and empty lines, so that nearly every mutation hits something.
    lines = (line.split("#")[0].rstrip() for line in recipe.read_text(encoding="utf-8").splitlines())
    original = "\n".join(line for line in lines if line)
    file = tmp_path / "run.toml"
    loads = 0
    for seed in range(AS_TEXT):
        rng = random.Random(f"text/{recipe.stem}/{seed}")
        file.write_bytes(mutate_text(rng, original).encode("utf-8", errors="surrogatepass"))
        config = loaded_or_one_line(lambda: load_config(file), str(file))
        if config:
            loads += 1
            check_loaded(config)
    assert 0 < loads < AS_TEXT


def test_the_same_seed_makes_the_same_mutation() -> None:
    def mutated() -> str:
        values = tomllib.loads(RECIPES[0].read_text(encoding="utf-8"))
        rng = random.Random("fixed")
        for _ in range(20):
            mutate(rng, values)
        return repr(values)

    assert mutated() == mutated()


@given(overrides=st.lists(st.text(max_size=30) | st.text("amodel.=[]{}\"'#5,\n ", max_size=20), max_size=2))
def test_any_override_loads_or_is_one_line(overrides: list[str]) -> None:
    try:
        load_config(RECIPES[0], overrides)
    except ConfigError as error:
        line = str(error)
    else:
        line = "loaded"
    assert line.isprintable()


TOO_LONG = "an integer beyond 64 bits; write a smaller one"
EXTREMES = [
    (["logging.every_steps" + ".a" * 5000 + "=1"], "logging.every_steps = (deeply nested): Input should be"),
    (["train.seed=0x" + "f" * 5000], f"train.seed: {TOO_LONG}"),
    (["schedule.kind=0x" + "f" * 5000], f"schedule.kind: {TOO_LONG}"),
    ([f"optimizer.betas=[0.9, {2**63}]"], f"optimizer.betas: {TOO_LONG}"),
    ([f"optimizer.lr={-(2**63) - 1}"], f"optimizer.lr: {TOO_LONG}"),
    (["a\x1b[2J=1"], "a\\x1b[2J: unknown key (known: name, "),
    (["a\nb=1"], "a\\nb: unknown key (known: name, "),
    (["train.precision=" + "x" * 5000], f"train.precision = '{'x' * 99}... (5002 characters): Input should be"),
    (["x" * 5000 + "=1"], f"{'x' * 100}... (5000 characters): unknown key"),
    (["objective.kind=" + "x" * 5000], f"objective = {{'kind': '{'x' * 90}"),
    # Halving 2**62 as a float must not be off.
    (
        ["train.seq_len=3", f"train.tokens_per_step={2**62}"],
        f"train.tokens_per_step = {2**62} is not a multiple of train.seq_len = 3; the nearest is {2**62 - 1}",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "line"), EXTREMES, ids=range(len(EXTREMES)))
def test_an_extreme_is_one_line_at_once(overrides: list[str], line: str) -> None:
    recipe = RECIPES[0]
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides)
    message = str(caught.value)
    assert message.startswith(f"{recipe}: {line}")
    assert message.isprintable()
    assert len(message) < 1000


def test_a_file_s_own_name_cannot_break_the_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*a\\nb\.toml: no such configuration file$"):
        load_config(tmp_path / "a\nb.toml")
