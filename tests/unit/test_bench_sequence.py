"""The benchmark of one row over processes: real ranks of ours at a tiny shape; no peer needs to be installed."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from roformer_dist.bench import sequence
from roformer_dist.bench.harness import Contender, Group, Measured, Sample
from roformer_dist.bench.report import Result, result_table
from roformer_dist.bench.run import run_benchmark, sequence_plan
from roformer_dist.bench.train import Shape
from roformer_dist.cli import app

TINY = Shape(vocab_size=64, hidden_size=32, num_layers=1, num_heads=2, gelu_size=64, swiglu_size=48)


def tiny_settings(**changes: object) -> sequence.SequenceSettings:
    values = {
        "lengths": (48,),
        "dtypes": ("fp32",),
        "processes": 2,
        "peers": (),
        "samples": 1,
        "steps": 2,
        "warmup_steps": 1,
        "shape": TINY,
    }
    return sequence.SequenceSettings(**{**values, **changes})  # pyright: ignore[reportArgumentType]


def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    file = tmp_path / "sequence.json"
    console = Console(width=160, record=True, file=io.StringIO())
    assert run_benchmark(sequence_plan(tiny_settings(), timeout=120), file, console) == 0, (
        console.export_text()
    )
    content = json.loads(file.read_text())
    (group,) = content["groups"]
    assert [entry["name"] for entry in group["contenders"]] == list(sequence.OURS)
    reported = [entry["samples"][0]["reported"] for entry in group["contenders"]]
    assert [len(each["peak_bytes_by_rank"]) for each in reported] == [2, 2, 1]
    for each in reported:
        assert each["loss"] == pytest.approx(reported[0]["loss"], rel=1e-5)
        assert each["grad_norm"] == pytest.approx(reported[0]["grad_norm"], rel=1e-4)
        assert each["loss"] == pytest.approx(4.16, abs=0.5)  # log(64)
        assert len(each["step_seconds"]) == len(each["step_cpu_seconds"]) == 2
        assert each["peak_bytes_above_import"] == max(each["peak_bytes_by_rank"])
    assert any(f"{sequence.RING} ÷ {sequence.ALONE}: s/step" in line for line in content["conclusions"])


def step(**changes: object) -> Sample:
    figures = {"dtype": "fp32", "loss": 4.0, "grad_norm": 2.0, "peak_bytes_above_import": 2**30}
    return Sample(1.0, 1, {**figures, "step_seconds": [1.0], "step_cpu_seconds": [2.0], **changes})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"loss": 4.00003}, None),
        ({"loss": 4.0001}, "loss 4.0001 against our 4: not the same step"),
        ({"grad_norm": 2.1}, "grad_norm 2.1 against our 2"),
        ({"loss": float("nan")}, "not the same step"),
        # The bug that most projects have shipped once: a gradient of as many times the size as there are ranks.
        ({"grad_norm": 4.0}, "not the same step"),
    ],
)
def test_every_contender_takes_the_same_step(change: dict[str, float], complaint: str | None) -> None:
    answer = sequence.same_loss(step(), step(**change))
    assert (answer is None) if complaint is None else (complaint in str(answer))


def test_peers_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (group,) = sequence.sequence_groups(tiny_settings(peers=("distributed-attention", "ulysses-hf")))
    names = [contender.name for contender in group.contenders]
    assert names == [*sequence.OURS, "DistributedAttention", "UlyssesSPAttentionHF"]
    install = 'deepspeed, transformers: not installed; pip install "roformer-dist[bench]"'
    assert [contender.missing for contender in group.contenders] == [None, None, None, install, install]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "4097"], "every length is a multiple of --processes 2"),
        (["--processes", "3"], "--processes 3: at least 2, and a divisor of the model's 8 heads"),
        (["--peers", "megatron"], "--peers 'megatron': choose from distributed-attention, ulysses-hf"),
        (["--dtype", "fp16"], "--dtype 'fp16': choose from fp32, bf16"),
    ],
)
def test_bad_options_name_themselves(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "sequence", *arguments])
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_the_table_names_everyone_in_full() -> None:
    names = [*sequence.OURS, *sequence.PEERS.values()]
    entries = [Measured(Contender(name, "ours", ()), [step(), step(step_seconds=[12.5])]) for name in names]
    group = Group("g", {}, [entry.contender for entry in entries])
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(result_table(Result(group, entries, sequence.METRICS), notes=sequence.NOTES))
    assert "…" not in console.export_text()
