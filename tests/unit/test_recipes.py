"""Recipes: each loads, fits the processes it names, and has the size it says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import roformer_dist
from roformer_dist.config import Config, derive, dump_config, load_config
from roformer_dist.data.tokenizer import MASK_ID
from roformer_dist.engine.deepspeed_config import deepspeed_config
from roformer_dist.model.roformer import RoFormer
from roformer_dist.resources import recipe

ROOT = Path(roformer_dist.__file__).parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.toml"))
# The quickstart is a tour with a file of its own rules.
REAL = [path for path in RECIPES if path.stem != "quickstart"]

# The base of imported weights is what they were trained with.
FROM_SCRATCH = [path for path in REAL if "init_from" not in path.read_text(encoding="utf-8")]


def name_of(path: Path) -> str:
    return path.stem


def header(path: Path, key: str) -> str:
    """What the recipe's ``# key: value`` comment says."""
    found = re.search(rf"^# {key}: (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"{path.name} has no '# {key}: ...' comment"
    return found[1]


def processes(path: Path) -> int:
    return int(header(path, "processes").split()[0])


class OnMeta(TorchFunctionMode):
    """Parameters without memory; everything else as usual (dropout keys are computed where they are made)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def num_parameters(config: Config) -> int:
    with OnMeta():
        network = RoFormer(config.model, masked=config.objective.kind == "masked", seed=0)
    parameters = list(network.parameters())
    assert {p.device.type for p in parameters} == {"meta"}
    return sum(p.numel() for p in parameters)


def test_there_are_the_recipes_that_the_documentation_promises() -> None:
    assert {path.stem for path in REAL} >= {
        "125m_8k_dp8",
        "350m_32k_dp4_sp2",
        "1b_32k_dp2_sp4",
        "1b_128k_sp8_zero3",
        "8b_128k_sp8_zero3",
        "llama_1b_128k_sp8_zero3",
        "roformer_base_mlm",
    }


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_is_found_by_its_name_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert recipe(path.stem).read_text(encoding="utf-8") == path.read_text(encoding="utf-8")
    again = tmp_path / "again.toml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again) == config


@pytest.mark.parametrize("path", REAL, ids=name_of)
def test_a_recipe_fits_the_processes_it_names(path: Path) -> None:
    config = load_config(path)
    shape = derive(config, processes(path))
    assert shape.dp_size * shape.sp_size == processes(path)
    assert shape.gradient_accumulation_steps >= 1
    # No row is padded, and DeepSpeed is given what it accepts.
    assert shape.local_seq_len * shape.sp_size == config.train.seq_len
    deepspeed_config(config, shape, "bf16")
    launch = header(path, "launch")
    assert launch == (
        f"roformer-dist launch local --config configs/{path.name} --processes {processes(path)}"
    )


@pytest.mark.parametrize("path", REAL, ids=name_of)
def test_heads_are_spread_whole_over_the_processes_of_a_row(path: Path) -> None:
    config = load_config(path)
    assert config.model.num_heads % config.parallel.sp_size == 0
    assert config.model.kv_heads % config.parallel.sp_size == 0


@pytest.mark.parametrize("path", REAL, ids=name_of)
def test_a_recipe_has_the_parameters_it_says(path: Path) -> None:
    assert header(path, "parameters") == f"{num_parameters(load_config(path)):,}"


def test_counting_without_memory_is_counting() -> None:
    config = load_config(ROOT / "configs" / "quickstart.toml")
    real = RoFormer(config.model, masked=False, seed=0)
    assert num_parameters(config) == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize("path", [p for p in REAL if p.stem != "roformer_base_mlm"], ids=name_of)
def test_the_name_says_size_context_and_mesh(path: Path) -> None:
    config = load_config(path)
    named = re.fullmatch(r"(?:llama_)?(\d+)([mb])_(\d+)k_(?:dp(\d+)_?)?(?:sp(\d+))?(?:_zero(\d))?", path.stem)
    assert named
    size, unit, context, dp_size, sp_size, zero_stage = named.groups()
    nominal = int(size) * (10**6 if unit == "m" else 10**9)
    # What others made has the name that they gave it: Llama 3.2 1B has 1.24 B.
    rel = 0.15 if path in FROM_SCRATCH else 0.25
    assert num_parameters(config) == pytest.approx(nominal, rel=rel)
    assert config.train.seq_len == int(context) * 1024
    assert config.parallel.sp_size == int(sp_size or 1)
    assert derive(config, processes(path)).dp_size == int(dp_size or 1)
    assert zero_stage is None or config.parallel.zero_stage == int(zero_stage)


def lowest_sum_of_cosines(theta: float, head_dim: int, seq_len: int) -> float:
    """The least ``sum_i cos(m theta_i)`` over distances m up to ``seq_len`` (arXiv 2405.14591)."""
    frequencies = theta ** (-2.0 * np.arange(head_dim // 2) / head_dim)
    chunks = np.array_split(np.arange(seq_len + 1), max(1, seq_len // 4096))
    return min(float(np.cos(m[:, None] * frequencies).sum(1).min()) for m in chunks)


@pytest.mark.parametrize("path", FROM_SCRATCH, ids=name_of)
def test_the_base_carries_the_whole_context(path: Path) -> None:
    config = load_config(path)
    theta, head_dim = config.model.rope.theta, config.model.head_size
    assert lowest_sum_of_cosines(theta, head_dim, config.train.seq_len) >= 0


@pytest.mark.parametrize(
    ("theta", "head_dim", "first_negative"),
    [(1e4, 64, 725), (1e4, 128, 1707), (1e5, 128, 7757), (8e6, 128, 61936)],
)
def test_the_figures_that_the_recipes_quote(theta: float, head_dim: int, first_negative: int) -> None:
    assert lowest_sum_of_cosines(theta, head_dim, first_negative - 1) >= 0
    assert lowest_sum_of_cosines(theta, head_dim, first_negative) < 0


def test_the_masked_recipe_is_the_paper_s() -> None:
    config = load_config(ROOT / "configs" / "roformer_base_mlm.toml")
    model = config.model
    assert (model.block, model.norm, model.mlp, model.bias) == ("post_norm", "layer_norm", "gelu", True)
    assert (model.hidden_size, model.num_layers, model.num_heads, model.intermediate_size) == (
        768,
        12,
        12,
        3072,
    )
    assert (model.rope.pairing, model.rope.theta, model.rope.scaling.kind) == ("interleaved", 10000.0, "none")
    assert config.objective.kind == "masked"
    assert config.objective.mask_id == MASK_ID
    rows = config.train.tokens_per_step // config.train.seq_len
    assert (rows, config.train.seq_len, config.train.num_steps) == (64, 512, 100_000)
    assert config.optimizer.lr == 1e-5


@pytest.mark.parametrize("path", REAL, ids=name_of)
def test_every_number_that_matters_is_written_and_not_left_to_a_default(path: Path) -> None:
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    assert values["optimizer"].keys() >= {"lr", "betas", "weight_decay", "max_grad_norm"}
    assert values["parallel"].keys() >= {"sp_size", "zero_stage"}
    assert "theta" in values["model"]["rope"]
    assert "seed" in values["train"]
