"""The main job with real commands and processes: train, be interrupted, be killed, resume, report."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import finish, kill_everything, launch, losses, points, prepare, run, wait_for_step

from roformer_dist import cli
from roformer_dist.trained import load_trained

STEPS = 40


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def uninterrupted(config: Path) -> Path:
    run_dir = config.parent / "uninterrupted"
    finish(launch(config, run_dir), run_dir)
    return run_dir


@pytest.fixture(scope="module")
def interrupted(config: Path) -> Path:
    """The same run, stopped by Ctrl-C once and killed once."""
    run_dir = config.parent / "interrupted"
    process = launch(config, run_dir)
    wait_for_step(run_dir, 4)
    process.send_signal(signal.SIGINT)
    said = finish(process, run_dir, expect=130)
    assert "the same command goes on from there" in said
    assert json.loads((run_dir / "status.json").read_text())["state"] == "stopped"

    process = launch(config, run_dir)
    wait_for_step(run_dir, 20)
    kill_everything(process)

    said = finish(launch(config, run_dir), run_dir)
    assert said.count("resumed after step") == 2
    return run_dir


def test_the_run_learns_and_finishes(uninterrupted: Path):
    by_step = losses(uninterrupted)
    assert sorted(by_step) == list(range(1, STEPS + 1))
    assert by_step[STEPS] < by_step[1] - 0.5
    assert json.loads((uninterrupted / "status.json").read_text()) == {"state": "finished", "step": STEPS}


def test_every_metric_of_the_contract_is_there(uninterrupted: Path):
    keys = {"loss", "grad_norm", "lr", "mfu", "tokens_per_sec", "data_wait", "memory_host_gib", "tokens_seen"}
    point = next(point for point in points(uninterrupted) if point["step"] == STEPS and "loss" in point)
    assert keys <= point.keys()
    assert any("validation_loss" in point for point in points(uninterrupted))


def test_interrupted_and_killed_gives_bit_identical_losses(uninterrupted: Path, interrupted: Path):
    assert losses(interrupted) == losses(uninterrupted)


def test_tensorboard_has_one_point_a_step_and_the_configuration(interrupted: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(interrupted / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, STEPS + 1))
    assert any("config" in tag for tag in events.Tags()["tensors"])


@pytest.mark.parametrize(
    ("key", "zero_stage"), [("parallel.sp_size=1", 3), ("parallel.ring_size=2", 1)], ids=["dp 2", "ring 2"]
)
def test_the_same_run_goes_on_at_another_mesh(config: Path, uninterrupted: Path, key: str, zero_stage: int):
    # Batches and loss do not depend on the mesh: stop at dp 1 x sp 2 (Ulysses), ZeRO-2; go on at another.
    run_dir = config.parent / f"remeshed_{zero_stage}"
    process = launch(config, run_dir)
    wait_for_step(run_dir, 20)
    process.send_signal(signal.SIGTERM)
    finish(process, run_dir, expect=130)
    changes = ["--processes", "2", "--set", key, "--set", f"parallel.zero_stage={zero_stage}"]
    assert "resumed after step" in finish(launch(config, run_dir, *changes), run_dir)
    for step, loss in losses(uninterrupted).items():
        assert losses(run_dir)[step] == pytest.approx(loss, rel=1e-4), step


def test_a_finished_run_says_so_and_does_nothing(config: Path, uninterrupted: Path):
    before = points(uninterrupted)
    assert "is finished" in finish(launch(config, uninterrupted), uninterrupted)
    assert points(uninterrupted) == before


def test_another_configuration_is_refused_in_one_line(config: Path, uninterrupted: Path):
    said = finish(launch(config, uninterrupted, "--set", "optimizer.lr=1.0"), uninterrupted, expect=2)
    line = said.splitlines()[-1]
    assert line.startswith("error:")
    assert "optimizer.lr = 0.003" in line
    assert "1.0" in line


def test_a_damaged_shard_stops_all_ranks_in_one_line(config: Path):
    shard = next((config.parent / "shards" / "train").glob("*.tar"))
    whole = shard.read_bytes()
    try:
        # Every document is damaged, so that the first one read is.
        shard.write_bytes(bytes(byte ^ 1 for byte in whole))
        run_dir = config.parent / "damaged"
        said = finish(launch(config, run_dir), run_dir, expect=2)
    finally:
        shard.write_bytes(whole)
    lines = [line for line in said.splitlines() if "is damaged" in line]
    assert len(lines) == 1, said
    assert re.search(rf"{re.escape(shard.name)}: document \d{{12}} is damaged", lines[0]), said
    assert "Traceback" not in said


def test_an_exploding_run_stops_before_it_is_saved(config: Path):
    # Left alone, DeepSpeed skips the update and the step would count as trained.
    run_dir = config.parent / "exploded"
    changes = ["--set", "optimizer.lr=1e30", "--set", "optimizer.max_grad_norm=1e30"]
    said = finish(launch(config, run_dir, *changes, "--set", "schedule.warmup_steps=0"), run_dir, expect=2)
    assert "lower optimizer.lr" in said
    assert not list((run_dir / "checkpoints").glob("step_*"))


def test_a_masked_model_trains_through_the_same_path(config: Path):
    run_dir = config.parent / "masked"
    changes = [
        'objective={kind="masked"}',
        "model.block=post_norm",
        "train.num_steps=12",
        "parallel.zero_stage=3",
    ]
    extra = [word for change in changes for word in ("--set", change)]
    finish(launch(config, run_dir, *extra), run_dir)
    by_step = losses(run_dir)
    assert by_step[12] < by_step[1]
    assert run("extrapolate", "--checkpoint", str(run_dir), expect=2) == ""
    assert run("generate", "--checkpoint", str(run_dir), "--prompt", "a", expect=2) == ""


def test_extrapolation_reports(uninterrupted: Path):
    printed = run("extrapolate", "--checkpoint", str(uninterrupted), "--lengths", "64,128,256", "--json")
    summary = json.loads(printed)
    assert set(summary["perplexity"]) == {"none", "linear", "ntk", "yarn", "cropped"}
    # Far below guessing at random; 512 targets are too few to hold against their own entropy.
    assert summary["validation_loss"] < math.log(512) - 0.5
    assert summary["context_gain_interval"][0] < summary["context_gain"] < summary["context_gain_interval"][1]
    assert {"unigram_entropy", "unigram_loss", "bigram_loss"} <= summary.keys()
    assert len(set(summary["perplexity"]["cropped"].values())) == 1
    assert set(summary["recalled"]) == {"none", "linear", "ntk", "yarn"}
    for name in ("report.html", "results.jsonl", "summary.json"):
        assert (uninterrupted / "extrapolation" / name).stat().st_size > 0
    assert list((uninterrupted / "extrapolation").glob("*.png"))


def test_two_processes_measure_and_generate_what_one_does(uninterrupted: Path, tmp_path: Path):
    asked = ["extrapolate", "--checkpoint", str(uninterrupted), "--lengths", "64,131", "--json"]
    asked += ["--token-budget", "9000"]
    alone, shared = (
        json.loads(run(*asked, "--out", str(tmp_path / name), *more))
        for name, more in (("alone", []), ("shared", ["--processes", "2", "--ring-size", "2"]))
    )
    for key in ("validation_loss", "short_context_loss", "context_gain", "context_gain_interval"):
        assert shared[key] == pytest.approx(alone[key], abs=1e-5)
    for method, by_length in alone["perplexity"].items():
        assert shared["perplexity"][method] == pytest.approx(by_length, rel=1e-5)
    assert shared["recalled"] == alone["recalled"]
    lines = [(tmp_path / name / "results.jsonl").read_text().splitlines() for name in ("alone", "shared")]
    assert len(lines[0]) == len(lines[1])
    asked = [
        "generate",
        "--checkpoint",
        str(uninterrupted),
        "--prompt",
        "The statement is executed",
        "--json",
    ]
    asked += ["--temperature", "1", "--seed", "4", "--max-new-tokens", "30", "--prefill-chunk", "5"]
    assert json.loads(run(*asked, "--processes", "2")) == json.loads(run(*asked))


def test_what_does_not_fit_the_processes_is_one_line(uninterrupted: Path):
    command = ["extrapolate", "--checkpoint", str(uninterrupted), "--processes", "2", "--ring-size", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "roformer_dist.cli", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "--ring-size 3 does not divide the 2 processes" in done.stderr
    assert "Traceback" not in done.stderr


def test_generate_continues_a_text_and_refuses_in_one_line(
    config: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def main(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["roformer-dist", "generate", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    asked = ["--checkpoint", str(uninterrupted), "--prompt", "The statement", "--max-new-tokens", "100"]
    printed = run("generate", *asked)
    code, out, _ = main(*asked, "--json", "--prefill-chunk", "2")
    found = json.loads(out)
    assert code == 0
    assert found["text"] + "\n" == printed
    assert found["step"] == STEPS
    assert found["finish"] == ("stop" if found["tokens"][-1] == 2 else "length")
    drawn = [main(*asked, "--json", "--temperature", "1", "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    # Forty steps teach little about positions; smaller features change any model's draws.
    assert (
        main(*asked, "--json", "--temperature", "1", "--seed", "1", "--set", "model.norm_eps=100.0")[1]
        != drawn[0]
    )
    newest = sorted((uninterrupted / "checkpoints").glob("step_*"))[-1]
    assert (
        load_trained(newest, ['model.rope.scaling={kind="linear",factor=8.0}']).network.rotary.inv_freq[0]
        == 1 / 8
    )
    prompt_file = config.parent / "prompt.txt"
    prompt_file.write_text("The statement")
    assert main("--prompt-file", str(prompt_file), *asked[:2], *asked[4:], "--json")[1] == out

    for arguments, part in (
        (["--checkpoint", str(config.parent / "nowhere"), "--prompt", "a"], "no such directory"),
        (["--checkpoint", str(config.parent), "--prompt", "a"], "no complete checkpoint"),
        (["--checkpoint", str(newest), "--prompt", ""], "the prompt is empty"),
        (["--checkpoint", str(newest)], "--prompt"),
        ([*asked, "--temperature", "-1"], "temperature"),
        ([*asked, "--top-p", "0.5"], "set a temperature"),
        ([*asked, "--set", "train.seq_len=8"], "only keys of model"),
        ([*asked, "--set", "model.hidden_size=64"], "shape of a weight"),
        ([*asked, "--set", "model.rope.scaling.knd=1"], "knd"),
    ):
        code, out, err = main(*arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        assert part in err, err
