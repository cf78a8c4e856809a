"""Every pair of choices works, compared with one process, or is refused with the configuration."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from subprocess import run

import pytest

from roformer_dist.parity.check import check_in_process
from roformer_dist.parity.command import verdict
from roformer_dist.parity.composition import FACTORS, Row, covering_rows, pairs, pairs_in, refusal, settings
from roformer_dist.parity.composition_page import markdown

PAGE = Path(__file__).parent.parent.parent / "docs" / "composition.md"
SHORT, FULL = covering_rows(families=True), covering_rows(families=False)


def row_id(row: Row) -> str:
    """The choices that are not the first of their kind."""
    return "-".join(name for kind, name in row.items() if name != next(iter(FACTORS[kind])))


def compare(row: Row) -> None:
    report = check_in_process(settings(row), [row["precision"]], 1)
    assert report.passed, verdict(report)
    compared = {kind["compared"]: kind["count"] for kind in report.rows()}
    assert {"labels", "loss", "gradients", "gradient norm", "parameters"} <= compared.keys()
    assert compared["gradients"] > 10


@pytest.mark.parametrize("row", SHORT, ids=row_id)
def test_a_mesh_computes_what_one_process_computes(row: Row) -> None:
    compare(row)


@pytest.mark.slow
@pytest.mark.parametrize("row", FULL, ids=row_id)
def test_every_pair_of_choices(row: Row) -> None:
    compare(row)


def _products() -> Iterator[Row]:
    for names in product(*(FACTORS[kind] for kind in ("position", "scheme", "layers", "objective"))):
        row = dict(zip(("position", "scheme", "layers", "objective"), names))
        if row["scheme"] != "one process" and refusal(row) is None:
            yield {kind: row.get(kind, next(iter(choices))) for kind, choices in FACTORS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("layers", FACTORS["layers"])
@pytest.mark.parametrize("scheme", [scheme for scheme in FACTORS["scheme"] if scheme != "one process"])
def test_position_scheme_layers_and_objective_in_full(scheme: str, layers: str) -> None:
    rows = [row for row in _products() if (row["scheme"], row["layers"]) == (scheme, layers)]
    assert len(rows) > 10
    for row in rows:
        report = check_in_process(settings({**row, "precision": "fp32"}), ["fp32"], 1)
        assert report.passed, f"{row}: {verdict(report)}"


@pytest.mark.parametrize(("rows", "families"), [(SHORT, True), (FULL, False)], ids=["short", "full"])
def test_the_rows_contain_every_pair_that_works(rows: list[Row], families: bool) -> None:
    working = [row for row, refused in pairs() if refused is None]
    found = {pair for row in rows for pair in pairs_in(row, families=families)}
    assert {pair for row in working for pair in pairs_in(row, families=families)} <= found
    assert {(kind, name) for row in rows for kind, name in row.items()} == {
        (kind, name) for kind, choices in FACTORS.items() for name in choices
    }
    assert [row for row in rows if refusal(row)] == []


def test_what_is_refused_is_one_line_with_what_fits() -> None:
    refused = [(row, reason) for row, reason in pairs() if reason]
    assert len(refused) > 20
    for row, reason in refused:
        assert "\n" not in reason, row
        assert any(word in reason for word in ("use ", "set ", "take ", "needs ", "no meaning")), reason


def test_a_choice_sets_keys_that_no_other_kind_sets() -> None:
    setters = [{key for choice in choices.values() for key in choice.keys} for choices in FACTORS.values()]
    assert sum(map(len, setters)) == len(set().union(*setters))


def test_the_page_is_the_generated_one() -> None:
    again = "python -m roformer_dist.parity.composition > docs/composition.md"
    assert PAGE.read_text(encoding="utf-8") == markdown(), f"write it again: {again}"
    done = run([sys.executable, *again.split()[1:3]], capture_output=True, check=True)
    assert done.stdout.decode() == markdown()
