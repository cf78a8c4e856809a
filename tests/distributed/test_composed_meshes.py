"""Schemes with ZeRO stages and compiled modules through the Engine on real processes, against one process."""

from __future__ import annotations

from typing import Any

import pytest
from spawn import run_ranks

from roformer_dist.config import Config
from roformer_dist.parity import composition
from roformer_dist.parity.command import verdict
from roformer_dist.parity.composition import FACTORS, Row, refusal, settings

SCHEMES, STAGES = list(FACTORS["scheme"]), list(FACTORS["ZeRO"])
# Each stage once, with everything else that the engine has a hand in.
SHORT: list[Row] = [
    {
        "scheme": scheme,
        "ZeRO": STAGES[number],
        "checkpointing": list(FACTORS["checkpointing"])[number],
        "MLP": ("whole", "tiled")[number % 2],
        "objective": list(FACTORS["objective"])[number % 3],
        "precision": "fp32",
    }
    for number, scheme in enumerate(("hybrid", "Ulysses, uneven heads", "Ulysses, replicated kv", "ring"))
]
FULL: list[Row] = [
    {"scheme": scheme, "ZeRO": stage, "precision": precision}
    for scheme in SCHEMES
    for stage in STAGES
    for precision in FACTORS["precision"]
]
COMPILED: list[Row] = [
    {"scheme": scheme, "ZeRO": stage, "precision": "fp32", "MLP": "compiled"}
    for scheme, stage in (("Ulysses", "stage 1"), ("ring", "stage 2"), ("hybrid", "stage 0"))
]


def _check(rank: int, world_size: int, rows: list[Row], compiled: bool) -> list[str]:
    """What is wrong with each row; nothing where it passes."""
    import torch

    from roformer_dist.parallel.comm import GroupComm
    from roformer_dist.parity import problem
    from roformer_dist.parity.processes import check_in_group

    if compiled:
        original = problem.shrink

        def shrink(config: Config, *, dp_size: int) -> Config:
            small = original(config, dp_size=dp_size)
            return small.model_copy(update={"train": small.train.model_copy(update={"compile": True})})

        problem.shrink = shrink
    world, wrong = GroupComm(), []
    for row in rows:
        report = check_in_group(settings(row), [row["precision"]], world, torch.device("cpu"))
        if report and not report.passed:
            wrong.append(f"{row}: {verdict(report)}")
        assert bool(report) == (rank == 0)
    return wrong


def compare(rows: list[Row], **options: Any) -> None:
    allowed = [row for row in rows if refusal(row) is None]
    assert run_ranks(4, _check, allowed, bool(options.pop("compiled", False)), **options)[0] == []


def test_every_zero_stage_on_a_shared_sequence() -> None:
    assert [row for row in SHORT if refusal(row)] == []
    compare(SHORT)


@pytest.mark.slow
def test_every_scheme_with_every_zero_stage() -> None:
    compare(FULL, timeout_s=1200)


@pytest.mark.slow
def test_compiled_modules_on_shared_sequences() -> None:
    compare(COMPILED, compiled=True, timeout_s=1200)


def test_the_rows_name_choices_that_there_are() -> None:
    for row in SHORT + FULL + COMPILED:
        assert all(name in composition.FACTORS[kind] for kind, name in row.items())
