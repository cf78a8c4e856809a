"""The main job from nothing to a report, as the commands a user would type one by one."""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from roformer_dist.config import Config, dump_config, parse_config
from roformer_dist.data.files import atomic_file
from roformer_dist.extrapolation.result import LABELS
from roformer_dist.resources import recipe

EXIT_OK, EXIT_FAILED = 0, 1


@dataclass(frozen=True)
class Step:
    """One command of the path.

    Attributes:
        title: what it does.
        arguments: of ``roformer-dist``.
        makes: the file whose presence means that the step is done; None for steps that know themselves.
    """

    title: str
    arguments: list[str]
    makes: Path | None = None


def run_quickstart(out: Path, *, json_output: bool) -> int:
    """Run every step that is not done yet; 0 when all went well, else the exit code of the one that failed.

    With ``json_output`` standard output carries the results alone and everything else goes to standard error.
    """
    console = Console(stderr=json_output, soft_wrap=True, highlight=False)
    started = time.perf_counter()
    config, config_file = _write_config(out)
    steps = _steps(config, config_file, out)
    for number, step in enumerate(steps, 1):
        console.print(f"\n[bold]{number}/{len(steps)} {step.title}[/]")
        if step.makes and step.makes.exists():
            console.print(f"  reused {step.makes}", markup=False)
            continue
        console.print(f"  $ roformer-dist {shlex.join(step.arguments)}", markup=False, style="dim")
        code = _run(step.arguments, to_stderr=json_output)
        if code:
            return code
    results = _results(out)
    if json_output:
        print(json.dumps(results, indent=2))
    _conclude(console, results, out, config_file, time.perf_counter() - started)
    return EXIT_OK


def _write_config(out: Path) -> tuple[Config, Path]:
    """The packaged recipe with its data under ``out``; an existing file is the user's and is kept."""
    file = out / "quickstart.toml"
    if file.exists():
        return parse_config(tomllib.loads(file.read_text(encoding="utf-8")), source=str(file)), file
    values = tomllib.loads(recipe("quickstart").read_text(encoding="utf-8"))
    values["data"] |= {
        "tokenizer": str(out / "tokenizer.model"),
        **{
            split: {"shards": str(out / "shards" / split), "plan": str(out / f"{split}.plan.npz")}
            for split in ("train", "validation")
        },
    }
    config = parse_config(values, source="the packaged quickstart recipe")
    # Whole or not at all: a rerun trusts what it finds.
    with atomic_file(file) as written:
        written.write(dump_config(config).encode())
    return config, file


def _steps(config: Config, config_file: Path, out: Path) -> list[Step]:
    corpus, data, run_dir = out / "corpus", config.data, out / "run"
    seq_len, vocab_size = str(config.train.seq_len), str(config.model.vocab_size)
    learn = ["data", "tokenizer", "--input", str(corpus / "train"), "--vocab-size", vocab_size]
    steps = [
        Step("A corpus: speeches, some held out", ["data", "corpus", "sotu", "--out", str(corpus)]),
        Step("A lossless tokenizer", [*learn, "--out", data.tokenizer], makes=Path(data.tokenizer)),
    ]
    for split, source in (("train", data.training[0].sources[0]), ("validation", data.validation)):
        shards = ["data", "shards", "--input", str(corpus / split), "--tokenizer", data.tokenizer]
        steps.append(Step(f"Shards of tokens: {split}", [*shards, "--out", source.shards]))
        pack = ["data", "pack", "--shards", source.shards, "--seq-len", seq_len]
        steps.append(Step(f"Rows: {split}", [*pack, "--out", source.plan], makes=Path(source.plan)))
    launch = ["launch", "local", "--config", str(config_file), "--run-dir", str(run_dir)]
    return [
        *steps,
        Step("Training on two processes that share each sequence", launch),
        Step(
            "Extrapolation beyond the trained length",
            ["extrapolate", "--checkpoint", str(run_dir), "--reuse"],
        ),
    ]


def _run(arguments: list[str], *, to_stderr: bool) -> int:
    command = [sys.executable, "-m", "roformer_dist.cli", *arguments]
    process = subprocess.Popen(command, stdout=sys.stderr if to_stderr else None)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            # The terminal told the step too; it saves and ends by itself.
            continue


def _results(out: Path) -> dict[str, Any]:
    from roformer_dist.engine.metrics import read_metrics

    run_dir = out / "run"
    summary = json.loads((run_dir / "extrapolation" / "summary.json").read_text(encoding="utf-8"))
    speeds = [point["tokens_per_sec"] for point in read_metrics(run_dir) if "tokens_per_sec" in point]
    return {**summary, "tokens_per_sec": statistics.median(speeds)}


def _conclude(
    console: Console, results: dict[str, Any], out: Path, config_file: Path, seconds: float
) -> None:
    low, high = results["context_gain_interval"]
    trained, longest = results["trained_seq_len"], max(results["lengths"])
    perplexity = results["perplexity"]
    scaled = {name: by[str(longest)] for name, by in perplexity.items() if name not in ("none", "cropped")}
    best = min(scaled, key=lambda name: scaled[name])
    at = str(longest)
    lines = [
        f"loss {results['validation_loss']:.2f} nats on held-out speeches; always guessing by word frequency "
        f"gives {results['unigram_entropy']:.2f}, a Kneser-Ney bigram {results['bigram_loss']:.2f}",
        f"context is used: seeing only the last 8 tokens costs {results['context_gain']:.3f} nats "
        f"(95 % interval {low:.3f} to {high:.3f})",
        f"speed {results['tokens_per_sec']:,.0f} tokens/s, both processes together",
        f"RoPE as trained goes from perplexity {perplexity['none'][str(trained)]:.0f} at {trained:,} tokens to "
        f"{perplexity['none'][at]:.0f} at {longest:,}",
        f"with {LABELS[best]} scaling it is {scaled[best]:.0f} at {longest:,}; the model cropped to {trained:,} "
        f"tokens has {perplexity['cropped'][at]:.0f}",
    ]
    run_dir = out / "run"
    console.print("\n[bold]What was learned[/]")
    for line in lines:
        console.print(f"  - {line}", markup=False)
    console.print(f"\n[bold]Where it is[/] ({seconds:.0f} s)")
    for what, path in (
        ("report", run_dir / "extrapolation" / "report.html"),
        ("run", run_dir),
        ("configuration", config_file),
    ):
        console.print(f"  {what:<14}{path}", markup=False)
    console.print("\n[bold]Next[/]")
    for command in (
        f"tensorboard --logdir {shlex.quote(str(run_dir / 'tensorboard'))}",
        f"roformer-dist data inspect {shlex.quote(str(out / 'train.plan.npz'))} "
        f"--shards {shlex.quote(str(out / 'shards' / 'train'))}",
        f"roformer-dist launch local --config {shlex.quote(str(config_file))} --set train.seed=2 --run-dir "
        f"{shlex.quote(str(out / 'run2'))}",
    ):
        console.print(f"  {command}", markup=False)
