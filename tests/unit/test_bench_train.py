"""The training benchmark: a tiny step of ours, fair work, options; no peer needs to be installed."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from test_data_tiny import tiny
from typer.testing import CliRunner

from roformer_dist.batch import IGNORE_INDEX
from roformer_dist.bench import train
from roformer_dist.bench.harness import (
    Contender,
    Group,
    Limits,
    Measured,
    Sample,
    run_group,
)
from roformer_dist.bench.ours import build
from roformer_dist.bench.report import Result, result_table
from roformer_dist.bench.run import run_benchmark, train_plan
from roformer_dist.bench.work import draw_work
from roformer_dist.cli import app
from roformer_dist.data.store import ShardStore

TINY = train.Shape(vocab_size=64, hidden_size=32, num_layers=1, num_heads=2, gelu_size=64, swiglu_size=48)


def tiny_settings(**changes: object) -> train.TrainSettings:
    values = {
        "lengths": (24,),
        "dtypes": ("fp32",),
        "threads": 1,
        "workloads": ("masked", "causal", "packed"),
        "peers": (),
        "samples": 1,
        "steps": 2,
        "warmup_steps": 1,
        "mean_document": 6,
        "shape": TINY,
    }
    return train.TrainSettings(**{**values, **changes})  # pyright: ignore[reportArgumentType]


def prints(name: str, figures: dict[str, float], role: str) -> Contender:
    """A contender that reports these figures."""
    code = f"print({json.dumps(json.dumps(figures))})"
    return Contender(name, role, (sys.executable, "-I", "-S", "-c", code), reports=True)  # pyright: ignore[reportArgumentType]


def test_a_tiny_training_benchmark_of_ours(tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    console = Console(width=120, record=True, file=io.StringIO())
    plan = train_plan(tiny_settings(workloads=("packed",), dtypes=("bf16",)), timeout=120, memory_limit=None)
    assert run_benchmark(plan, file, console) == 0, console.export_text()
    content = json.loads(file.read_text())
    (group,) = content["groups"]
    (ours,) = group["contenders"]
    (sample,) = ours["samples"]
    reported = sample["reported"]
    assert sum(group["parameters"]["documents"]) == reported["tokens"] == 24
    assert reported["targets"] == 24 - len(group["parameters"]["documents"])
    assert len(reported["step_seconds"]) == 2
    assert 0 < reported["peak_bytes_above_import"] < reported["import_bytes"]
    assert (reported["threads"], reported["parameter_bytes"]) == (1, 2 * reported["parameters"])
    assert ours["figures"]["tokens_per_second"]["median"] == pytest.approx(
        24 / (sum(reported["step_seconds"]) / 2)
    )
    assert content["parameters"]["shape"]["num_layers"] == 1


@pytest.mark.parametrize("workload", train.WORKLOADS)
def test_ours_makes_gradients_of_every_parameter(workload: str) -> None:
    documents = (10, 6) if workload == "packed" else (16,)
    job = train.Job("ours", workload, documents, "fp32", 1, 1, 0, TINY)
    assert train.Job.from_json(job.to_json()) == job
    network, step = build(job, draw_work(job))
    loss = step()
    assert loss == pytest.approx(4.16, abs=0.5)  # log(64)
    # Only a masked model sees what comes after a token.
    work = draw_work(job)
    work.input_ids[0, -1] = (work.input_ids[0, -1] + 1) % 64
    work.labels[0, -1] = IGNORE_INDEX
    before = replace(work, input_ids=draw_work(job).input_ids)
    seen = build(job, work)[1]() != build(job, before)[1]()
    assert seen == (workload == "masked")
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_targets_are_next_tokens_inside_documents() -> None:
    work = draw_work(train.Job("ours", "packed", (3, 2), "fp32", 1, 1, 0, TINY))
    ids = work.input_ids[0].tolist()
    assert work.labels[0].tolist() == [ids[1], ids[2], -100, ids[4], -100]
    assert work.position_ids[0].tolist() == [0, 1, 2, 0, 1]
    assert work.targets == 3


@pytest.mark.parametrize("length", [2, 3, 7, 512, 4096])
def test_documents_fill_the_row_and_each_has_a_target(length: int) -> None:
    documents = train.draw_documents(length, 64)
    assert sum(documents) == length
    assert min(documents) >= 2
    assert min(train.draw_documents(length, 2)) >= 2
    assert documents == train.draw_documents(length, 64)


def test_documents_have_about_the_mean_length() -> None:
    documents = train.draw_documents(200_000, 100)
    assert sum(documents) / len(documents) == pytest.approx(100, rel=0.1)


def reported(**changes: object) -> Sample:
    return Sample(1.0, 1, {"targets": 100, "parameters": 1000, "loss": 4.0, **changes})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"parameters": 1009}, None),
        ({"parameters": 1011}, "more than 1 % apart"),
        ({"parameters": 989}, "more than 1 % apart"),
        ({"targets": 99}, "not the same work"),
        ({"loss": 4.6}, "not the same work"),
        ({"loss": float("nan")}, "not the same work"),
    ],
)
def test_a_peer_does_the_same_work(change: dict[str, float], complaint: str | None) -> None:
    answer = train.same_work(reported(), reported(**change))
    assert (answer is None) if complaint is None else (complaint in str(answer))


def test_a_peer_that_does_other_work_fails() -> None:
    def contender(name: str, parameters: int, role: str) -> Contender:
        figures = {"targets": 1, "parameters": parameters, "loss": 1.0}
        return prints(name, figures, role)

    group = Group("g", {}, [contender("A", 100, "ours"), contender("B", 120, "peer")], check=train.same_work)
    ours, peer = run_group(group, rounds=1, warmups=0, limits=Limits(60), environment={})
    assert ours.failure is None
    assert peer.failure == "120 parameters against our 100: more than 1 % apart"


def test_peers_of_each_workload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    groups = train.train_groups(tiny_settings(peers=("hf-roformer", "hf-llama"), lengths=(24, 48)))
    names = [[contender.name for contender in group.contenders] for group in groups]
    assert names == [
        *[["ours", "hf-roformer"]] * 2,
        *[["ours", "hf-llama"]] * 2,
        *[["ours", "hf-llama dense mask", "hf-llama by document"]] * 2,
    ]
    assert {c.missing for group in groups for c in group.contenders[1:]} == {train.NOT_INSTALLED}
    assert all(group.contenders[0].missing is None for group in groups)
    assert all(group.check is train.same_work for group in groups)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "1k"], "write whole numbers"),
        (["--lengths", "1"], "at least 2 tokens"),
        (["--peers", "hf-bert"], "--peers 'hf-bert': choose from hf-roformer, hf-llama"),
        (["--dtype", "fp16"], "--dtype 'fp16': choose from fp32, bf16"),
        (["--workloads", "prefix"], "--workloads 'prefix'"),
    ],
)
def test_bad_options_name_themselves(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "train", *arguments])
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_notes_stand_below_the_table_which_fits_a_terminal() -> None:
    sample = reported(
        tokens=4096, step_seconds=[1.5], step_cpu_seconds=[3.0], peak_bytes_above_import=9e9, parameters=17e6
    )
    entries = [Measured(Contender(role, role, ()), [sample, sample]) for role in ("ours", "peer")]
    group = Group("g", {}, [entry.contender for entry in entries])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(result_table(Result(group, entries, train.METRICS), notes=train.NOTES))
    text = " ".join(console.export_text().split())
    assert "…" not in text
    assert "parameters: ours 17.00 M, peer 17.00 M; loss: ours 4.000, peer 4.000" in text


def test_packed_rows_have_the_lengths_of_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i, words in enumerate((5, 17, 40, 90)):
        (tmp_path / "text" / f"{i}.txt").write_text("the of " * words)
    tokenizer = tiny().tokenizer.path
    command = ["data", "shards", "--input", str(tmp_path / "text"), "--tokenizer", str(tokenizer)]
    CliRunner().invoke(app, [*command, "--out", str(tmp_path / "shards")], catch_exceptions=False)
    real = set(ShardStore(str(tmp_path / "shards")).lengths.tolist())
    assert len(real) == 4
    settings = tiny_settings(lengths=(3000,), workloads=("packed",), lengths_from=str(tmp_path / "shards"))
    (group,) = train.train_groups(settings)
    (job,) = (train.Job.from_json(contender.command[-1]) for contender in group.contenders)
    assert sum(job.documents) == 3000
    assert real == set(job.documents[:-1])  # the last one is cut
    assert f"drawn from {tmp_path / 'shards'}" in group.title
    with pytest.raises(ValueError, match="nowhere"):
        train.train_groups(tiny_settings(lengths_from="nowhere"))
