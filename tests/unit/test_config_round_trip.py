"""The configuration after a round trip, its derived integers, and its keys: read and described."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import tomli_w
from config_example import BASE, YARN
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

import roformer_dist
from roformer_dist.config import Config, config_hash, derive, dump_config, load_config, parse_config
from roformer_dist.config.section import Section


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(BASE)
    return path


ALTERNATIVES = [
    *(
        [f"model.rope.scaling={{{a}}}"]
        for a in ('kind="none"', 'kind="linear", factor=2.0', 'kind="ntk", factor=3.5')
    ),
    [f"model.rope.scaling={{{YARN}}}"],
    [f"model.rope.scaling={{{YARN}, beta_fast=16.0, beta_slow=2.5}}"],
    [f"model.rope.scaling={{{YARN}, mscale=0.7, mscale_all_dim=1.0, truncate=false}}"],
    ['model.rope.scaling={kind="dynamic", factor=2.0, original_seq_len=32}'],
    ['model.rope.scaling={kind="llama3", factor=8.0, original_seq_len=32, high_freq_factor=2.5}'],
    [
        'model.rope.scaling={kind="longrope", original_seq_len=32, factor=4.0, '
        "short_factor=[1, 1.5, 2.0, 2], long_factor=[1.0, 2, 3, 4]}"
    ],
    ["model.rope.partial=0.25", "model.rope.rotary_value=true", "model.qk_norm=true", "model.block=parallel"],
    ["model.embedding_size=16", "model.head_transform=true", "model.type_vocab_size=2"],
    ["model.attention_bias=qkv"],
    ['objective={kind="classification", num_labels=3, pooling="mean"}'],
    ['model.rope.policy={kind="plain"}', "model.position.kind=rotary"],
    ['model.rope.policy={kind="rerope", window=8}', "parallel.sp_size=1"],
    ['model.rope.policy={kind="self_extend", window=8, group=4}', "parallel.sp_size=1"],
    ['model.position={kind="learned", max_seq_len=32}'],
    ['model.position={kind="relative_bias", num_buckets=16, max_distance=64}', "parallel.sp_size=1"],
    ["model.position.kind=sinusoidal"],
    ["model.position.kind=alibi", "parallel.sp_size=1"],
    ["model.position.kind=none"],
    ['model.layers=["sliding", "full"]', "model.sliding_window=4"],
    ['model.layers=["linear", "no_position"]', "model.linear_features=softmax"],
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
        seen |= {
            type(x).__name__
            for x in (
                config.model.rope.scaling,
                config.model.rope.policy,
                config.model.position,
                config.objective,
                config.schedule,
            )
        }
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


# Keys


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
