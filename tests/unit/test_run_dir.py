"""A run's directory belongs to one configuration."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

import roformer_dist
from roformer_dist.config import Config, load_config, parse_config
from roformer_dist.engine.run_dir import claim_run_dir, read_status, write_environment, write_status

RECIPE = Path(roformer_dist.__file__).parent.parent / "configs" / "quickstart.toml"


def config(**changes: Any) -> Config:
    """The quickstart, the keys that are likely to be tuned pinned, with ``section__key`` values changed."""
    values = tomllib.loads(RECIPE.read_text())
    values["train"]["tokens_per_step"], values["optimizer"]["lr"] = 8192, 3e-3
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            values.setdefault(section, {})[key] = value
        else:
            values[section] = value
    return parse_config(values, source="test")


def test_a_new_directory_is_made_and_holds_the_resolved_configuration(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "a"
    claim_run_dir(run_dir, config())
    assert load_config(run_dir / "config.toml") == config()
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.toml", "lock"]


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    claim_run_dir(tmp_path, config())
    assert (tmp_path / "config.toml").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallel__sp_size": 1},
        {"parallel__zero_stage": 3},
        {"train__micro_batch_size": 4},
        {"train__kernel": "reference"},
        {"data__workers": 0},
        {"checkpoint__every_steps": 7},
        {"validation__rows": 3},
        {"logging": {"every_steps": 1}},
    ],
    ids=str,
)
def test_the_same_run_spread_watched_or_saved_otherwise_goes_on(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    claim_run_dir(tmp_path, config())
    (tmp_path / "metrics.jsonl").touch()
    claim_run_dir(tmp_path, config(**changes))
    # The record is that of the newest start.
    assert load_config(tmp_path / "config.toml") == config(**changes)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model__num_layers": 5}, "model.num_layers = 4, this configuration has 5"),
        ({"model__rope": {"theta": 5e5}}, "model.rope = {"),
        ({"train__seq_len": 256}, "train.seq_len = 512, this configuration has 256"),
        ({"train__tokens_per_step": 16384}, "train.tokens_per_step = 8192, this configuration has 16384"),
        ({"train__seed": 2}, "train.seed = 1, this configuration has 2"),
        ({"train__precision": "fp32"}, "train.precision = 'auto', this configuration has 'fp32'"),
        ({"optimizer__lr": 1e-4}, "optimizer.lr = 0.003, this configuration has 0.0001"),
        ({"schedule": {"kind": "inverse_sqrt", "warmup_steps": 20}}, "schedule.kind = 'cosine'"),
        (
            {"objective": {"kind": "masked", "mask_id": 3}},
            "objective.kind = 'causal', this configuration has 'masked'",
        ),
        ({"data__tokenizer": "other.model"}, "data.tokenizer = 'quickstart/tokenizer.model'"),
        ({"name": "other"}, "name = 'quickstart', this configuration has 'other'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_another_run_is_refused_by_the_key_that_differs(
    tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    claim_run_dir(tmp_path, config())
    before = (tmp_path / "config.toml").read_bytes()
    with pytest.raises(ValueError, match="choose another --run-dir") as caught:
        claim_run_dir(tmp_path, config(**changes))
    assert f"holds a run with {key}" in str(caught.value)
    assert (tmp_path / "config.toml").read_bytes() == before


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(ValueError, match="not empty and not a run's directory; choose another --run-dir"):
        claim_run_dir(tmp_path, config())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("words")
    with pytest.raises(OSError, match="Not a directory"):
        claim_run_dir(tmp_path / "run", config())


@pytest.mark.parametrize("damage", [b"name = ", b"\xff\xfe", b"name = 5\n"])
def test_a_damaged_record_is_refused(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "config.toml").write_bytes(damage)
    with pytest.raises(ValueError, match=r"config\.toml: "):
        claim_run_dir(tmp_path, config())
    assert (tmp_path / "config.toml").read_bytes() == damage


def test_every_start_adds_what_it_ran_on(tmp_path: Path) -> None:
    write_environment(tmp_path, {"kernel": "sdpa"})
    write_environment(tmp_path, {"kernel": "reference"})
    first, second = json.loads((tmp_path / "environment.json").read_text())
    assert (first["kernel"], second["kernel"]) == ("sdpa", "reference")
    assert first["packages"].keys() >= {"torch", "deepspeed", "roformer-dist"}
    assert first["cores"] >= 1


def test_the_last_status_counts(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    write_status(tmp_path, "running", 3)
    write_status(tmp_path, "finished", 10)
    assert read_status(tmp_path) == {"state": "finished", "step": 10}
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_directory_has_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        claim_run_dir(tmp_path, config()),
        pytest.raises(ValueError, match=r"process \d+ on \S+ trains in it; wait for it or choose another"),
    ):
        claim_run_dir(tmp_path, config())
    claim_run_dir(tmp_path, config()).close()


def test_damaged_notes_do_not_stop_a_run(tmp_path: Path) -> None:
    # They only inform; the truth about a run is in its checkpoints.
    (tmp_path / "status.json").write_bytes(b'{"state": "fin')
    (tmp_path / "environment.json").write_bytes(b"\xff\xfe")
    assert read_status(tmp_path) is None
    write_environment(tmp_path, {"mesh": "here"})
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1


def test_what_a_killed_start_leaves_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("process 1 on host")
    (tmp_path / ".config.toml.1.partial").write_text("na")
    claim_run_dir(tmp_path, config()).close()
    assert (tmp_path / "config.toml").exists()
