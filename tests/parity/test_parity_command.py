"""``roformer-dist parity`` over every recipe, on many ranks, and on real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from roformer_dist.config import load_config
from roformer_dist.parity.check import Report, check_in_process, precisions_of
from roformer_dist.parity.command import run_parity, verdict, with_mesh
from roformer_dist.parity.problem import make_problem

RECIPES = sorted((Path(__file__).parent.parent.parent / "configs").glob("*.toml"))
QUICKSTART = next(path for path in RECIPES if path.stem == "quickstart")
MESHES = [(2, 1), (4, 2)]
KINDS = {
    "labels' checksum",
    "replicas",
    "holders",
    "inputs",
    "labels",
    "positions",
    "loss",
    "gradient norm",
    "gradients",
    "parameters",
}


def compare(recipe: Path, mesh: tuple[int, int], precisions: list[str] | None = None) -> Report:
    sp, ring = mesh
    config = with_mesh(load_config(recipe), sp=sp, ring=ring, zero=None)
    report = check_in_process(config, precisions or precisions_of(config), 1)
    assert report.passed, verdict(report)
    assert {row["compared"] for row in report.rows()} >= KINDS
    # Work is counted, not timed: what is trained stays tiny whatever the recipe trains.
    small = make_problem(config, dp_size=1).config
    assert small.train.tokens_per_step * small.train.num_steps <= 3 * 4 * max(97, 12 * sp + 1)
    assert small.model.num_layers <= max(2, len(config.model.layers))
    assert small.model.hidden_size <= 64
    return report


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: "sp{}ring{}".format(*m))
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_trains_alike_on_a_mesh(recipe: Path, mesh: tuple[int, int]) -> None:
    compare(recipe, mesh, ["fp32"])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: "sp{}ring{}".format(*m))
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_in_its_own_precisions(recipe: Path, mesh: tuple[int, int]) -> None:
    assert "bf16" in compare(recipe, mesh).checks


def test_a_long_ring_stays_within_twice_the_error_of_bf16() -> None:
    # A bf16 kernel rounds each hop's gradients before they are summed in float32.
    compare(QUICKSTART, (8, 8), ["bf16"])


def parity(recipe: str, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    config = next(path for path in RECIPES if path.stem == recipe)
    command = [sys.executable, "-m", "roformer_dist.cli", "parity", "--config", str(config), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.slow
def test_sixty_four_ranks_share_a_sequence_on_a_laptop() -> None:
    mesh = ["--sp", "64", "--ring", "8", "--set", "train.precision=fp32", "--json"]
    said = json.loads(parity("1b_128k_sp8_zero3", *mesh).stdout)
    assert said["passed"]
    assert said["mesh"].startswith("dp 1 x sp 64 (Ulysses 8 x ring 8")


def test_real_processes_from_the_command_line() -> None:
    mesh = ["--processes", "2", "--zero", "3", "--set", "train.precision=fp32", "--json"]
    said = json.loads(parity("quickstart", *mesh).stdout)
    assert said["passed"]
    assert {row["compared"] for row in said["rows"]} >= KINDS


@pytest.mark.parametrize(
    ("mesh", "overrides", "said"),
    [
        (
            {"ring": 2},
            ["parallel.ulysses_size=2"],
            "--ring 2 makes ulysses_size = 1, and --set parallel.ulysses_size=2",
        ),
        ({"sp": 4}, ["parallel.sp_size=2"], "--sp 4 makes sp_size = 4, and --set parallel.sp_size=2"),
        (
            {"sp": 4, "ring": 4},
            ["parallel.ring_size=2", "parallel.sp_size=4"],
            "--sp 4 --ring 4 makes ring_size = 4, and --set parallel.ring_size=2",
        ),
        (
            {"sp": 7},
            [],
            "leaves 7 ranks to Ulysses, which gives each at least one of model.num_heads = 4; give --ring 7",
        ),
        ({"sp": 64}, [], "leaves 64 ranks to Ulysses, .*; give --ring 16"),
        ({"sp": 64, "ring": 2}, [], "with a ring of 2 leaves 32 ranks .*; give --ring 16"),
        ({"sp": 8}, ['model.position={kind="alibi"}'], "give --sp 4 or less"),
    ],
    ids=str,
)
def test_a_mesh_that_contradicts_or_does_not_fit_is_refused_with_what_would(
    mesh: dict[str, int], overrides: list[str], said: str
) -> None:
    assert load_config(QUICKSTART).model.num_heads == 4
    with pytest.raises(ValueError, match=said):
        run_parity(QUICKSTART, overrides, **mesh)


def test_an_override_that_agrees_is_none_to_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["parallel.ulysses_size=2", "train.precision=fp32"]
    assert run_parity(QUICKSTART, overrides, sp=4, ring=2)
    assert "(Ulysses 2 x ring 2" in capsys.readouterr().out


def test_a_number_of_processes_that_does_not_fit_is_one_line() -> None:
    done = parity("quickstart", "--processes", "3", expect=2)
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert "--processes 3 is not a multiple of sp_size = 2" in line
