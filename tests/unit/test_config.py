"""The configuration: strict, one clear line for every mistake, and the same after a round trip."""

from __future__ import annotations

import ast
import copy
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import tomli_w
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import BaseModel

import roformer_dist
from roformer_dist.config import (
    Config,
    ConfigError,
    config_hash,
    derive,
    dump_config,
    load_config,
    parse_config,
)
from roformer_dist.config.schema import Section

RECIPES = Path(roformer_dist.__file__).parent.parent / "configs"
BASE = """
name = "run"

[model]
vocab_size = 64
hidden_size = 32
num_layers = 2
num_heads = 4
num_kv_heads = 2
intermediate_size = 48

[data]
tokenizer = "t.model"
train = { shards = "train", plan = "train.npz" }
validation = { shards = "val", plan = "val.npz" }

[parallel]
sp_size = 2

[train]
seq_len = 32
tokens_per_step = 256
micro_batch_size = 2
num_steps = 100

[optimizer]
lr = 1e-3

[schedule]
kind = "cosine"
warmup_steps = 10

[checkpoint]
every_steps = 50

[validation]
every_steps = 50
rows = 8
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(BASE)
    return path


def error_of(file: Path, *overrides: str) -> str:
    """The message without the file's name."""
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{file}: ")


YARN = 'kind = "yarn", factor = 2.0, original_seq_len = 32'
GOLDEN = {
    # Unknown keys
    "model.num_head=4": "model.num_head: unknown key (did you mean num_heads?)",
    "modell.x=1": "modell: unknown key (did you mean model?)",
    'data.train.shard="x"': "data.train.shard: unknown key (did you mean shards?)",
    "checkpoint.foo=1": "checkpoint.foo: unknown key (known: every_steps, keep, background)",
    'model.rope.scaling={kind="linear", factor=2.0, beta=1}': (
        "model.rope.scaling.beta: unknown key (known: kind, factor)"
    ),
    # Missing keys
    'model.rope.scaling={kind="ntk"}': "model.rope.scaling.factor: this key is required",
    "schedule.kind=wsd": "schedule.decay_steps: this key is required",
    'objective.kind="masked"': "objective.mask_id: this key is required",
    # Types: nothing is coerced
    "model.hidden_size=32.0": "model.hidden_size = 32.0: Input should be a valid integer",
    "model.hidden_size=true": "model.hidden_size = True: Input should be a valid integer",
    "model.bias=1": "model.bias = 1: Input should be a valid boolean",
    'optimizer.lr="1e-3"': "optimizer.lr = '1e-3': Input should be a valid number",
    "optimizer.betas=[0.9]": "optimizer.betas.1: this key is required",
    "train=5": "train = 5: Input should be a valid dictionary or instance of TrainConfig",
    # Values
    "model.vocab_size=0": "model.vocab_size = 0: Input should be greater than 0",
    "model.hidden_dropout=1.0": "model.hidden_dropout = 1.0: Input should be less than 1",
    "model.rope.theta=1.0": "model.rope.theta = 1.0: Input should be greater than 1",
    "optimizer.lr=nan": "optimizer.lr = nan: Input should be a finite number",
    "optimizer.weight_decay=inf": "optimizer.weight_decay = inf: Input should be a finite number",
    "optimizer.betas=[0.9, 1.0]": "optimizer.betas.1 = 1.0: Input should be less than 1",
    "parallel.zero_stage=4": "parallel.zero_stage = 4: Input should be less than or equal to 3",
    "train.precision=fp16": "train.precision = 'fp16': Input should be 'auto', 'bf16' or 'fp32'",
    "name=../x": "name = '../x': String should match pattern '^[A-Za-z0-9_][A-Za-z0-9._-]*$'",
    "name=..": "name = '..': String should match pattern '^[A-Za-z0-9_][A-Za-z0-9._-]*$'",
    # Tags of unions
    "schedule.kind=linear": (
        "schedule = {'kind': 'linear', 'warmup_steps': 10}: Input tag 'linear' found using 'kind' does not match "
        "any of the expected tags: 'cosine', 'wsd', 'inverse_sqrt'"
    ),
    "model.rope.scaling={factor=2.0}": (
        "model.rope.scaling = {'factor': 2.0}: Unable to extract tag using discriminator 'kind'"
    ),
    # Contradictions
    "model.hidden_size=34": (
        "model: hidden_size = 34 is not divisible by num_heads = 4; set head_dim or change one of them"
    ),
    "model.head_dim=7": "model: head_dim = 7 is odd; a rotation needs pairs of dimensions",
    "model.num_kv_heads=3": "model: num_heads = 4 is not divisible by num_kv_heads = 3",
    "model.attention_dropout=0.1": (
        "model: attention_dropout = 0.1 cannot be honoured: flash kernels draw it from their own generator, so it "
        "would differ between meshes; set it to 0 and use hidden_dropout"
    ),
    f"model.rope.scaling={{{YARN}, beta_fast = 1.0}}": (
        "model.rope.scaling: beta_fast = 1.0 must be greater than beta_slow = 1.0"
    ),
    "train.tokens_per_step=250": (
        "train.tokens_per_step = 250 is not a multiple of train.seq_len = 32; the nearest is 256"
    ),
    "schedule.warmup_steps=101": "schedule: 101 warm-up and 0 decay steps do not fit into train.num_steps = 100",
    'objective={kind="masked", mask_id=64}': "objective.mask_id = 64 is outside model.vocab_size = 64",
    # The mesh
    "parallel.sp_size=4": (
        "parallel.sp_size = 4 does not divide model.num_kv_heads = 2: Ulysses gives each process whole heads; "
        "sp_size may be one of [1, 2]"
    ),
    "parallel.sp_size=3": (
        "parallel.sp_size = 3 does not divide model.num_heads = 4: Ulysses gives each process whole heads; "
        "sp_size may be one of [1, 2]"
    ),
    # Overrides themselves
    "train.num_steps": "--set 'train.num_steps': write section.key=value",
    "=3": "--set '=3': write section.key=value",
    "train..seed=1": "--set 'train..seed=1': write section.key=value",
    "train.seed.x=1": "--set 'train.seed.x=1': seed is a value, not a section",
}


@pytest.mark.parametrize(("override", "line"), GOLDEN.items(), ids=range(len(GOLDEN)))
def test_a_mistake_is_one_line_with_key_value_and_what_would_fit(
    file: Path, override: str, line: str
) -> None:
    if override == "train.seed.x=1":
        file.write_text(BASE.replace("num_steps = 100", "num_steps = 100\nseed = 1"))
    assert error_of(file, override) == line


def test_ntk_of_two_dimensional_heads_is_refused_with_the_configuration(file: Path) -> None:
    line = error_of(file, "model.head_dim=2", 'model.rope.scaling={kind="ntk", factor=2.0}')
    assert (
        line == "model: rope.scaling: ntk needs head_dim > 2; with a single pair there is no base to change"
    )


def test_several_mistakes_are_counted(file: Path) -> None:
    line = error_of(file, "model.num_head=4", "train.foo=1", "train.num_steps=-1")
    assert line == "model.num_head: unknown key (did you mean num_heads?) (and 2 more)"


@pytest.mark.parametrize(
    "section", ["model", "data", "train", "optimizer", "schedule", "checkpoint", "validation"]
)
def test_every_required_section_is_named_when_it_is_missing(section: str) -> None:
    values = tomllib.loads(BASE)
    del values[section]
    with pytest.raises(ConfigError, match=rf"^here: {section}: this key is required$"):
        parse_config(values, source="here")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name = ", "not valid TOML: Invalid value"),
        (b'name = "\xff"', "cannot be read as UTF-8 text"),
        (b"seed = " + b"1" * 5000, "not valid TOML"),
        (b"x = " + b"[" * 5000, "not valid TOML"),
        (b"", "name: this key is required (and 7 more)"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    assert error_of(file).startswith(message)


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    assert error_of(tmp_path / "no.toml") == "no such configuration file"
    assert "cannot be read" in error_of(tmp_path)


def test_overrides_take_toml_values_and_bare_words(file: Path) -> None:
    config = load_config(
        file,
        [
            "train.seed=7",
            "train.precision=bf16",
            "optimizer.lr=2e-4",
            "optimizer.betas=[0.8, 0.99]",
            "model.bias=true",
            " logging.every_steps = 3 ",
            'model.rope.scaling={kind="linear", factor=4.0}',
            "model.rope.theta=500000.0",
        ],
    )
    assert (config.train.seed, config.train.precision, config.optimizer.lr) == (7, "bf16", 2e-4)
    assert (config.optimizer.betas, config.model.bias, config.logging.every_steps) == ((0.8, 0.99), True, 3)
    assert (config.model.rope.scaling.kind, config.model.rope.theta) == ("linear", 500000.0)
    # The last one counts.
    assert load_config(file, ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_an_override_of_too_many_digits_is_one_line(file: Path) -> None:
    assert error_of(file, "train.seed=" + "1" * 5000).startswith("train.seed = '111")


ALTERNATIVES = [
    *(
        [f"model.rope.scaling={{{a}}}"]
        for a in ('kind="none"', 'kind="linear", factor=2.0', 'kind="ntk", factor=3.5')
    ),
    [f"model.rope.scaling={{{YARN}}}"],
    [f"model.rope.scaling={{{YARN}, beta_fast=16.0, beta_slow=2.5}}"],
    ["objective.kind=causal"],
    ['objective={kind="masked", mask_id=3}'],
    ['objective={kind="masked", mask_id=3, mask_probability=0.3}'],
    ["schedule.min_ratio=0.0"],
    ['schedule={kind="wsd", warmup_steps=5, decay_steps=20}'],
    ['schedule={kind="inverse_sqrt", warmup_steps=5}'],
    ["model.num_kv_heads=4", "model.head_dim=10", "train.seed=3", "optimizer.betas=[0.5, 0.75]"],
    ["optimizer.eps=1e-15", "optimizer.lr=1", f"train.seed={2**63 - 1}"],
]


@pytest.mark.parametrize("overrides", ALTERNATIVES, ids=lambda o: o[0][:50])
def test_dumping_and_loading_gives_an_equal_configuration(file: Path, overrides: list[str]) -> None:
    config = load_config(file, overrides)
    file.write_text(dump_config(config))
    again = load_config(file)
    assert again == config
    assert config_hash(again) == config_hash(config)
    assert dump_config(again) == dump_config(config)


def test_every_alternative_of_every_union_is_among_those_round_trips(file: Path) -> None:
    def kinds(section: type[BaseModel]) -> set[str]:
        found = set()
        for field in section.model_fields.values():
            for part in (field.annotation, *get_args(field.annotation)):
                if isinstance(part, type) and issubclass(part, BaseModel):
                    found |= kinds(part)
                    if "kind" in part.model_fields:
                        found.add(part.__name__)
        return found

    seen = set()
    for overrides in ALTERNATIVES:
        config = load_config(file, overrides)
        seen |= {type(x).__name__ for x in (config.model.rope.scaling, config.objective, config.schedule)}
    assert seen == kinds(Config)


def test_the_hash_sees_every_change_but_not_the_order_of_keys() -> None:
    values = tomllib.loads(BASE)
    turned = {
        key: dict(reversed(v.items())) if isinstance(v, dict) else v for key, v in reversed(values.items())
    }
    config = parse_config(values, source="a")
    assert config_hash(config) == config_hash(parse_config(turned, source="b"))
    values["train"]["seed"] = 1
    assert config_hash(config) != config_hash(parse_config(values, source="c"))


def test_a_configuration_is_immutable() -> None:
    config = parse_config(tomllib.loads(BASE), source="a")
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 5  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_every_recipe_loads_and_has_its_file_s_name(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.name == recipe.stem
    derive(config, config.parallel.sp_size)


# Derived integers


@pytest.mark.parametrize(
    ("world_size", "dp_size", "accumulation"), [(2, 1, 4), (4, 2, 2), (8, 4, 1)], ids=["2", "4", "8"]
)
def test_a_step_is_spread_over_the_processes(
    file: Path, world_size: int, dp_size: int, accumulation: int
) -> None:
    shape = derive(load_config(file), world_size)
    assert (shape.world_size, shape.dp_size, shape.sp_size) == (world_size, dp_size, 2)
    assert (shape.rows_per_step, shape.gradient_accumulation_steps, shape.local_seq_len) == (
        8,
        accumulation,
        16,
    )


def test_an_odd_row_is_padded_to_whole_slices(file: Path) -> None:
    assert derive(load_config(file, ["train.seq_len=33", "train.tokens_per_step=264"]), 2).local_seq_len == 17


def test_processes_that_do_not_fit_are_refused_with_the_numbers(file: Path) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        derive(load_config(file), 3)
    assert str(caught.value) == (
        "parallel.sp_size = 2 does not divide the 3 processes started; start a multiple of 2 or change sp_size"
    )
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        derive(load_config(file), 6)
    assert str(caught.value) == (
        "train.tokens_per_step = 256 makes 8 rows of 32, which 3 replicas x train.micro_batch_size = 2 do not divide; "
        "192 tokens would fit"
    )


@given(
    world=st.integers(1, 40),
    rows=st.integers(1, 60),
    micro=st.integers(1, 9),
    sp_size=st.sampled_from([1, 2]),
)
def test_a_shape_accounts_for_every_row_and_its_advice_fits(
    world: int, rows: int, micro: int, sp_size: int
) -> None:
    values = tomllib.loads(BASE)
    values["train"] |= {"tokens_per_step": rows * 32, "micro_batch_size": micro}
    values["parallel"] = {"sp_size": sp_size}
    config = parse_config(values, source="x")
    try:
        shape = derive(config, world)
    except ValueError as error:
        if "would fit" in str(error):
            values["train"]["tokens_per_step"] = int(str(error).split("; ")[1].split()[0])
            derive(parse_config(values, source="x"), world)
        else:
            assert world % sp_size
        return
    assert shape.dp_size * shape.sp_size == world
    assert shape.dp_size * micro * shape.gradient_accumulation_steps == shape.rows_per_step == rows


# Anything at all


def leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path] if path else []
    for key, value in values.items():
        found += leaves(value, (*path, key)) if isinstance(value, dict) else [(*path, key)]
    return found


PATHS = [*leaves(tomllib.loads(BASE)), ("model", "rope", "scaling"), ("objective",), ("logging",)]
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["cosine", "wsd", "masked", "yarn", "linear", "kind", 0.5, 16, 10**400])
)
keys = st.sampled_from(
    ["kind", "factor", "train", "cosine", "yarn", "", "a.b", "x\ny", "warmup_steps", "mask_id"]
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)


def loaded_or_one_line(load: Callable[[], Config], start: str) -> Config | None:
    try:
        return load()
    except ConfigError as error:
        line = str(error)
    assert line.startswith(start)
    assert len(line.splitlines()) == 1
    return None


@given(
    mutations=st.lists(
        st.tuples(st.sampled_from(PATHS), st.sampled_from(["set", "delete", "add"]), keys, anything),
        min_size=1,
        max_size=3,
    )
)
@hypothesis_settings(max_examples=200)
def test_any_mutation_loads_or_is_one_line(mutations: list[tuple[tuple[str, ...], str, str, Any]]) -> None:
    values: dict[str, Any] = copy.deepcopy(tomllib.loads(BASE))
    for path, action, key, value in mutations:
        place: Any = values
        for part in path[:-1]:
            place = place.get(part, {}) if isinstance(place, dict) else {}
        if not isinstance(place, dict):
            continue
        if action == "delete":
            place.pop(path[-1], None)
        elif action == "set":
            place[path[-1]] = value
        elif isinstance(place.get(path[-1]), dict):
            place[path[-1]][key] = value
    config = loaded_or_one_line(lambda: parse_config(values, source="fuzz"), "fuzz: ")
    if config:
        assert parse_config(tomllib.loads(dump_config(config)), source="again") == config


@given(overrides=st.lists(st.text(max_size=30) | st.text("amodel.=[]{}\"'#5,\n ", max_size=20), max_size=2))
def test_any_override_loads_or_is_one_line(
    overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "overrides.toml"
    file.write_text(BASE)
    loaded_or_one_line(lambda: load_config(file, overrides), "")


def test_every_key_is_read_somewhere() -> None:
    # A key that nothing reads is a promise that nothing keeps.
    package = Path(roformer_dist.__file__).parent
    read = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.MatchClass):
                read |= set(node.kwd_attrs)
    keys = {name for section in all_sections(Section) for name in section.model_fields}
    assert keys - read - {"kind"} == set()


def all_sections(base: type[Section]) -> list[type[Section]]:
    return [s for sub in base.__subclasses__() for s in (sub, *all_sections(sub))]


def test_every_key_is_described() -> None:
    # These texts are the configuration's documentation. Sections describe themselves in their docstrings.
    sections = all_sections(Section)
    for section in sections:
        assert section.__doc__, section
        for name, field in section.model_fields.items():
            is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            if name != "kind" and not is_section and section is not Config:
                assert field.description, f"{section.__name__}.{name}"


def test_a_dump_is_toml_that_a_reader_can_follow() -> None:
    config = parse_config(tomllib.loads(BASE), source="a")
    assert tomllib.loads(dump_config(config))["model"]["num_kv_heads"] == 2
    # Defaults are written out, and nothing is null.
    assert "zero_stage = 1" in dump_config(config)
    assert tomli_w.dumps(tomllib.loads(dump_config(config))) == dump_config(config)
