"""Learning rates at the steps that matter, by literal numbers."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import roformer_dist
from roformer_dist.config import Config, parse_config
from roformer_dist.engine.schedule import learning_rate

RECIPE = Path(roformer_dist.__file__).parent.parent / "configs" / "quickstart.toml"


def config(num_steps: int, **schedule: object) -> Config:
    values = tomllib.loads(RECIPE.read_text())
    values["train"]["num_steps"] = num_steps
    values["optimizer"]["lr"] = 1.0
    values["schedule"] = schedule
    return parse_config(values, source="test")


COSINE = config(10, kind="cosine", warmup_steps=4, min_ratio=0.1)
WSD = config(10, kind="wsd", warmup_steps=2, decay_steps=4, min_ratio=0.2)
INVERSE_SQRT = config(100, kind="inverse_sqrt", warmup_steps=4)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Step 0 trains already; the peak is the last of the warm-up; six steps of half a cosine end at 0.1.
        (COSINE, {0: 0.25, 1: 0.5, 3: 1.0, 4: 0.9397114317, 6: 0.55, 8: 0.1602885683, 9: 0.1}),
        (WSD, {0: 0.5, 1: 1.0, 2: 1.0, 5: 1.0, 6: 0.8, 7: 0.6, 8: 0.4, 9: 0.2}),
        (INVERSE_SQRT, {0: 0.25, 3: 1.0, 4: 0.894427191, 15: 0.5, 99: 0.2}),
        (config(10, kind="cosine", warmup_steps=0, min_ratio=0.0), {0: 0.9755282581, 4: 0.5, 9: 0.0}),
        (config(4, kind="cosine", warmup_steps=4), {0: 0.25, 3: 1.0}),
        (config(5, kind="wsd", warmup_steps=0, decay_steps=0), {0: 1.0, 4: 1.0}),
        (config(5, kind="wsd", warmup_steps=2, decay_steps=3), {1: 1.0, 2: 2 / 3, 4: 0.0}),
        # A run of the smallest size.
        (config(1, kind="cosine", warmup_steps=0, min_ratio=0.1), {0: 0.1}),
        (config(1, kind="inverse_sqrt", warmup_steps=1), {0: 1.0}),
    ],
    ids=range(9),
)
def test_rates_by_literal_numbers(schedule: Config, expected: dict[int, float]) -> None:
    for step, rate in expected.items():
        assert learning_rate(schedule, step) == pytest.approx(rate, abs=1e-9), step


@pytest.mark.parametrize("schedule", [COSINE, WSD, INVERSE_SQRT], ids=["cosine", "wsd", "inverse_sqrt"])
def test_a_schedule_rises_to_the_peak_once_and_never_again(schedule: Config) -> None:
    rates = [learning_rate(schedule, step) for step in range(schedule.train.num_steps)]
    top = schedule.schedule.warmup_steps - 1
    assert max(rates) == rates[top] == 1.0
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0


def test_the_peak_is_the_optimizer_s_rate() -> None:
    values = tomllib.loads(RECIPE.read_text())
    recipe = parse_config(values, source="test")
    assert learning_rate(recipe, recipe.schedule.warmup_steps - 1) == values["optimizer"]["lr"]
