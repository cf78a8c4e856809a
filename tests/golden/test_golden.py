"""Golden files: a change of a default, a schedule or the arithmetic is seen in review or not made at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import regenerate

from roformer_dist.config import load_config

AGAIN = "; if this was meant: python tests/golden/regenerate.py"


@pytest.mark.parametrize("recipe", regenerate.recipes(), ids=lambda path: path.stem)
def test_a_recipe_resolves_to_what_it_did(recipe: Path) -> None:
    golden = regenerate.RESOLVED / recipe.name
    assert golden.is_file(), f"{golden} is missing{AGAIN}"
    assert regenerate.resolved(recipe) == golden.read_text(encoding="utf-8"), f"{golden} differs{AGAIN}"
    assert load_config(golden) == load_config(recipe)


def test_no_golden_configuration_outlives_its_recipe() -> None:
    known = {path.name for path in regenerate.recipes()}
    assert {path.name for path in regenerate.RESOLVED.iterdir()} == known, AGAIN


def test_a_tiny_run_has_the_loss_curve_that_it_had() -> None:
    golden = json.loads(regenerate.LOSS_CURVE.read_text(encoding="utf-8"))
    curve = regenerate.loss_curve()
    assert curve.keys() == golden.keys()
    for name, values in golden.items():
        assert curve[name] == pytest.approx(values, rel=1e-4), f"{name} differs{AGAIN}"


def test_the_tiny_run_exercises_what_it_is_there_for() -> None:
    curve = json.loads(regenerate.LOSS_CURVE.read_text(encoding="utf-8"))
    assert curve["loss"][-1] < 0.6 * curve["loss"][0]
    # Warm-up, peak and decay; steps that are clipped and steps that are not.
    assert curve["lr"].index(max(curve["lr"])) == 4
    assert (
        min(curve["grad_norm"]) < regenerate.tiny_config().optimizer.max_grad_norm < max(curve["grad_norm"])
    )
