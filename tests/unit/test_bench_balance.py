"""``bench attention --lengths-from``: a ring's balance with documents as long as those of shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_data_tiny import tiny
from typer.testing import CliRunner

from roformer_dist.bench.app import bench_app
from roformer_dist.bench.attention import document_lengths

SMALL = "attention --ranks 2 --tokens 16 --heads 2 --kv-heads 2 --head-dim 4".split()  # noqa: SIM905


def test_a_row_is_filled_with_lengths_of_the_documents_drawn_by_the_seed() -> None:
    lengths = tiny().store.lengths
    drawn = document_lengths(100_000, lengths, seed=1)
    assert drawn.sum() == 100_000
    assert set(drawn[:-1].tolist()) <= set(lengths.tolist())
    # With replacement, each as often as the others.
    assert abs(np.mean(drawn) - np.mean(lengths)) < 0.5 * np.mean(lengths)
    assert drawn.tolist() == document_lengths(100_000, lengths, seed=1).tolist()
    assert drawn.tolist() != document_lengths(100_000, lengths, seed=2).tolist()


# 8 tokens a rank: what several short documents leave cannot be evened out.
@pytest.mark.parametrize(("ranks", "tokens", "code"), [(8, 128, 0), (64, 8, 1)])
def test_the_exit_code_says_whether_the_work_is_balanced(
    ranks: int, tokens: int, code: int, tmp_path: Path
) -> None:
    shards, file = tiny().root / "shards", tmp_path / "a.json"
    sizes = ["--balance-ranks", str(ranks), "--balance-tokens", str(tokens)]
    done = CliRunner().invoke(bench_app, [*SMALL, *sizes, "--lengths-from", str(shards), "--json", str(file)])
    assert done.exit_code == code
    assert "as in shards" in done.output
    rows = {str(row["documents"]): row["max_over_mean"] for row in json.loads(file.read_text())["balance"]}
    assert (rows.pop(str(shards)) > 1.05) == bool(code)
    assert max(rows.values()) <= 1.05
