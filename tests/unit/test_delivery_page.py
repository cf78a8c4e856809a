"""docs/data_delivery.md is enough to say which rows fill slot s: written from the page with plain integers."""

from __future__ import annotations

from fractions import Fraction
from math import gcd
from typing import Any

import pytest
from data_runs import SEED, SEQ_LEN, B, stages_of
from test_data_order import page_row

from roformer_dist.data.stages import Stage, Timeline


def quotas_of(weights: list[Any]) -> list[int]:
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [10_000 * weight / sum(exact) for weight in exact]
    quotas = [share.numerator // share.denominator for share in shares]
    order = sorted(range(len(shares)), key=lambda s: (-(shares[s] - quotas[s]), s))
    for s in order[: 10_000 - sum(quotas)]:
        quotas[s] += 1
    return quotas


def drawn_as(t: int, quotas: list[int]) -> tuple[int, int]:
    """The source of slot t, and its number in that source."""
    common = gcd(*quotas)
    q = [quota // common for quota in quotas]
    total, c, chosen = sum(q), [0] * len(q), 0
    for i in range(t % total + 1):
        behind = [s for s in range(len(q)) if c[s] * total < q[s] * (i + 1)]
        chosen = min(behind, key=lambda s: ((c[s] + 1) / q[s], s))
        c[chosen] += 1
    return chosen, t // total * q[chosen] + c[chosen] - 1


def row_of(plan: Any, n: int) -> int:
    sizes = [int(size) for size in plan.group_offsets[1:] - plan.group_offsets[:-1]]
    return page_row(n, sizes, plan.options.window, SEED, int(plan.hash[:16], 16))


def in_stage(stage: Stage, slot: int) -> tuple[Any, int]:
    """The plan of a slot counted from the stage's first, and its number in that plan."""
    plans = [plan for source in stage.sources for plan in source.plans]
    if len(stage.sources) < len(plans):
        quotas = [max(1, q) for q in quotas_of([p.num_rows * p.seq_len for p in plans])]
        number, m = drawn_as(slot // B, quotas)
        return plans[number], m * B + slot % B
    number, m = drawn_as(slot, quotas_of([source.weight for source in stage.sources]))
    return plans[number], m


def page_rows(stages: tuple[Stage, ...], slot: int) -> tuple[str, list[int]]:
    """The plan and the rows of a slot."""
    first = number = 0
    while (num_steps := stages[number].num_steps) and slot >= (first + num_steps) * B:
        first += num_steps
        number += 1
    plan, m = in_stage(stages[number], slot - first * B)
    f = SEQ_LEN // plan.seq_len
    # What the stages before drew of this plan, slot by slot.
    before = sum(
        in_stage(stage, t)[0] is plan for stage in stages[:number] for t in range((stage.num_steps or 0) * B)
    )
    return plan.hash, [row_of(plan, before * f + m * f + i) for i in range(f)]


@pytest.mark.parametrize("kind", ["short form", "mixture", "stages", "buckets"])
def test_the_rows_of_every_slot_are_what_the_page_says(kind: str) -> None:
    stages = stages_of(kind)
    timeline = Timeline(stages, seed=SEED, seq_len=SEQ_LEN, global_batch=B)
    for step in (0, 3, 5, 9, 10, 12, 15, 40):
        found = {
            slot: (part.plan.hash, rows)
            for part in timeline.parts(step)
            for slot, rows in zip(part.slots.tolist(), part.rows.tolist())
        }
        assert found == {slot: page_rows(stages, slot) for slot in range(step * B, step * B + B)}
