"""The configuration: strict, and one clear line for every mistake."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from config_example import BASE, YARN

from roformer_dist.config import ConfigError, load_config, parse_config
from roformer_dist.config.derive import evaluation_mesh
from roformer_dist.config.parallel import ParallelConfig


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


GOLDEN = {
    # Unknown keys
    "model.num_head=4": "model.num_head: unknown key (did you mean num_heads?)",
    "modell.x=1": "modell: unknown key (did you mean model?)",
    'data.train.shard="x"': "data.train.shard: unknown key (did you mean shards?)",
    "checkpoint.foo=1": "checkpoint.foo: unknown key (known: every_steps, keep, background, init_from)",
    'model.rope.scaling={kind="linear", factor=2.0, beta=1}': (
        "model.rope.scaling.beta: unknown key (known: kind, factor)"
    ),
    # Missing keys
    'model.rope.scaling={kind="ntk"}': "model.rope.scaling.factor: this key is required",
    "schedule.kind=wsd": "schedule.decay_steps: this key is required",
    "data.train={shards='a'}": "data.train.plan: this key is required",
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
    "parallel.sp_size=5": (
        "parallel: ulysses_size = 5 is more than model.num_heads = 4, and Ulysses gives each process at least one "
        "head; spread the rest over parallel.ring_size"
    ),
    "parallel={sp_size = 4, ring_size = 3}": (
        "parallel: ring_size = 3 does not divide sp_size = 4; sp_size is ulysses_size x ring_size"
    ),
    "parallel={sp_size = 4, ulysses_size = 4, ring_size = 2}": (
        "parallel: ulysses_size = 4 x ring_size = 2 is 8, not sp_size = 4; change one of them or leave sp_size out"
    ),
    "parallel={ring_size = 0}": "parallel.ring_size = 0: Input should be greater than 0",
    "parallel={head_chunks = 2}": (
        "parallel: head_chunks = 2 is for sequences that several processes share; with sp_size = 1 set it to 1"
    ),
    "parallel.head_chunks=3": (
        "parallel.head_chunks = 3 is more than the 2 heads that each of 2 processes has of model.num_heads = 4; "
        "at most 2 would fit"
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


def test_an_evaluation_takes_the_training_s_mesh_or_fills_the_heads_first(file: Path) -> None:
    model = load_config(file).model
    heads = model.num_heads

    def mesh(processes: int, **sizes: int) -> tuple[int, int]:
        found = evaluation_mesh(model, ParallelConfig(ulysses_size=1, ring_size=2), processes, **sizes)
        assert found.sp_size == processes
        return found.ulysses, found.ring_size

    assert mesh(1) == (1, 1)
    assert mesh(2) == (1, 2)  # as in training
    assert mesh(heads * 3) == (heads, 3)
    assert mesh(4, ring_size=4) == (1, 4)
    assert mesh(4, ulysses_size=2) == (2, 2)
    for sizes, message in (
        ({"ring_size": 3}, "--ring-size 3 does not divide the 4 processes"),
        ({"ulysses_size": 1, "ring_size": 2}, "is 2, and every row is shared by all 4 processes"),
    ):
        with pytest.raises(ValueError, match=message):
            mesh(4, **sizes)
    with pytest.raises(ValueError, match=r"more than model\.num_heads"):
        mesh(heads * 2, ring_size=1)
