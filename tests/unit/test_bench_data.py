"""``bench data``: the same rows for everyone, a peer that is missing is named, wrong options are one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_data_tiny import tiny
from typer.testing import CliRunner

from roformer_dist.bench import data_peers
from roformer_dist.bench.data import DataSettings, same_rows, write_rows
from roformer_dist.bench.data_child import epochs_of
from roformer_dist.bench.harness import Sample
from roformer_dist.cli import app


def test_rows_for_peers_are_those_that_ours_delivers(tmp_path: Path) -> None:
    plan = tiny().plan()
    plan.save(tmp_path / "plan.npz")
    write_rows(tiny().store, plan, tmp_path)
    theirs = data_peers.batch_of(list(data_peers.stored_rows(tmp_path)))
    assert theirs[0].shape == (plan.num_rows, plan.seq_len)
    ours: dict[bytes, np.ndarray] = {}
    for ids, labels, positions in epochs_of(str(tiny().root / "shards"), str(tmp_path / "plan.npz"), 1)():
        ours[ids.numpy().tobytes()] = np.stack([labels[0], positions[0]])
    assert len(ours) == plan.num_rows
    for ids, labels, positions in zip(*theirs):
        mine = ours[ids.numpy().tobytes()]
        assert mine[1].tolist() == positions.tolist()
        # Theirs stop at the end of a piece, ours look into the next row, and ignore padding.
        both = (mine[0] != -100) & (labels.numpy() != -100)
        assert (mine[0][both] == labels.numpy()[both]).all()
        assert both.sum() > 0


def test_a_run_measures_who_is_there_and_names_what_is_missing(tmp_path: Path) -> None:
    tiny().plan().save(tmp_path / "plan.npz")
    command = ["bench", "data", "--shards", str(tiny().root / "shards"), "--plan", str(tmp_path / "plan.npz")]
    options = [
        "--peers",
        "webdataset,litdata",
        "--batch",
        "1",
        "--peer-python",
        "litdata=/no/such/python",
        "--samples",
        "1",
    ]
    done = CliRunner().invoke(app, [*command, *options, "--json", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    assert "litdata: not installed for /no/such/python" in " ".join(done.output.split())
    contenders = json.loads((tmp_path / "out.json").read_text())["groups"][0]["contenders"]
    assert [one["status"] for one in contenders] == ["measured", "measured", "missing"], done.output
    ours = contenders[0]
    assert ours["figures"]["warm_tokens_per_second"]["median"] > 0
    assert ours["samples"][0]["reported"]["rows"] == tiny().plan().num_rows


def test_other_rows_are_not_the_same_work() -> None:
    ours = Sample(1.0, 1, {"rows": 1000, "tokens": 10**6, "sum": 5 * 10**8})
    assert same_rows(ours, ours) is None
    assert "rows against our" in str(same_rows(ours, Sample(1.0, 1, {**ours.reported, "rows": 900})))
    assert "mean token" in str(same_rows(ours, Sample(1.0, 1, {**ours.reported, "sum": 10**8})))


@pytest.mark.parametrize(
    "options", [{"peers": ("nobody",)}, {"pythons": {"nobody": "python"}}], ids=["peers", "pythons"]
)
def test_an_unknown_peer_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="'nobody': choose from webdataset"):
        DataSettings("shards", "plan.npz", **options)
