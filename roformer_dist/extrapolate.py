"""Behind ``roformer-dist extrapolate``: a checkpoint's losses beside baselines, and over context length."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from roformer_dist.config.derive import evaluation_mesh
from roformer_dist.data.baselines import KneserNeyBigram, unigram_cross_entropy, unigram_entropy
from roformer_dist.data.files import atomic_file
from roformer_dist.data.loader import evaluation_batches
from roformer_dist.data.plan import Plan
from roformer_dist.data.store import documents
from roformer_dist.engine.agreement import together
from roformer_dist.engine.datasets import Opened, make_objective
from roformer_dist.engine.group import Group, joined_group
from roformer_dist.engine.initial import find_together
from roformer_dist.engine.scoring import Continuer, Scorer
from roformer_dist.extrapolation.context import ContextGain, context_gain
from roformer_dist.extrapolation.report import Source, result_table, write_report
from roformer_dist.extrapolation.result import SweepResult, findings
from roformer_dist.extrapolation.retrieval import (
    RetrievalResult,
    Trials,
    retrieval_findings,
    run_retrieval,
    trials_within,
)
from roformer_dist.extrapolation.retrieval_report import retrieval_table
from roformer_dist.extrapolation.sweep import Grid, check_sweep, run_sweep
from roformer_dist.extrapolation.sweep import Progress as Report
from roformer_dist.kernels.attention import choose_kernel
from roformer_dist.parallel.mesh import build_mesh
from roformer_dist.trained import Trained, load_trained

SUMMARY = "summary.json"
DEFAULT_MULTIPLES = (1, 2, 4, 8)
BASELINE_TOKENS = 10_000_000  # of the training text that word frequencies and bigrams are counted in


@dataclass(frozen=True)
class Spread:
    """How processes share every row, as far as the user says; see ``evaluation_mesh``."""

    processes: int | None = None
    ulysses_size: int | None = None
    ring_size: int | None = None


ALONE = Spread()


@dataclass(frozen=True)
class _Asks:
    """What all ranks ask of the network together."""

    score: Scorer
    continue_: Continuer


def run_extrapolate(
    checkpoint: Path,
    *,
    lengths: Sequence[int] | None,
    methods: Sequence[str],
    out: Path | None,
    token_budget: int,
    retrieval_trials: int | None,
    reuse: bool,
    console: Console,
    spread: Spread = ALONE,
) -> dict[str, Any] | None:
    """Evaluate, write the report beside the run, and return the summary; None on all ranks but the first.

    Args:
        checkpoint: a checkpoint, or a run's directory for its newest one.
        lengths: contexts in tokens; None: 1, 2, 4 and 8 times the trained length.
        out: where to write; None: ``extrapolation`` in the run's directory.
        retrieval_trials: passages asked for at every length, method and depth; None as in ``trials_within``.
        reuse: return the summary that is there when it is of this very checkpoint.
        spread: how the processes that a launcher started share every row.
    """
    with joined_group(spread.processes) as group:
        path = find_together(checkpoint, group.world, group.device)
        run_dir = path.parent.parent
        out = out or run_dir / "extrapolation"
        trained = together(lambda: load_trained(path, device=group.device), group.world, group.device)
        config = together(trained.run_config, group.world, group.device)
        settings = {
            "checkpoint_sha256": trained.fingerprint,
            "lengths": sorted(lengths or [m * config.train.seq_len for m in DEFAULT_MULTIPLES]),
            "methods": list(methods),
            "token_budget": token_budget,
        }
        grid = together(lambda: _grid(trained, settings), group.world, group.device)
        trials, left_out = together(
            lambda: trials_within(
                lambda: Opened(config).store(config.data.validation.shards),
                grid,
                token_budget=token_budget,
                asked=retrieval_trials,
            ),
            *(group.world, group.device),
        )
        settings["retrieval_trials"] = len(trials.passages) if trials else 0
        if reuse and (kept := _kept_summary(out, settings, group)) is not None:
            if group.leads:
                console.print(f"reused {out / SUMMARY}", markup=False, highlight=False)
            return kept
        asks = together(lambda: _checked(trained, settings, spread, group), group.world, group.device)(group)
        shown = console if group.leads else Console(quiet=True)
        if left_out:
            shown.print(f"retrieval by depth is left out: {left_out}", markup=False, highlight=False)
        with _progress(shown) as progress:
            learned = _learned(trained, asks.score, progress)
            result = _sweep(trained, asks.score, settings, progress)
            retrieval = _retrieval(trained, asks, trials, grid, progress) if trials else None
    if not group.leads:
        return None
    summary = {**settings, **_summary(trained, learned, result, retrieval)}
    _write_report(result, retrieval, trained, out, run_dir, console)
    with atomic_file(out / SUMMARY) as file:
        file.write((json.dumps(summary, indent=2) + "\n").encode())
    return summary


def _checked(
    trained: Trained, settings: dict[str, Any], spread: Spread, group: Group
) -> Callable[[Group], _Asks]:
    """What computes, once all ranks know that everything fits."""
    config = trained.run_config()
    Opened(config).rows(config.data.validation)
    mesh = evaluation_mesh(
        config.model,
        config.parallel,
        group.world.size,
        ulysses_size=spread.ulysses_size,
        ring_size=spread.ring_size,
    )
    # The reference if the run asked for it; otherwise the training's kernel may be one of another device.
    name = "reference" if config.train.kernel == "reference" else "auto"
    kernel, _ = choose_kernel(name, group.device, trained.network.embedding.weight.dtype)

    def asks(group: Group) -> _Asks:
        ranks = build_mesh(group.world, ulysses_size=mesh.ulysses, ring_size=mesh.ring_size)
        return _Asks(Scorer(kernel, ranks, group.device), Continuer(kernel, group.world, group.device))

    return asks


def _grid(trained: Trained, settings: dict[str, Any]) -> Grid:
    return check_sweep(
        trained.network,
        trained_seq_len=trained.run_config().train.seq_len,
        lengths=settings["lengths"],
        methods=settings["methods"],
    )


def _kept_summary(out: Path, settings: dict[str, Any], group: Group) -> dict[str, Any] | None:
    """The summary that the first rank finds, if it is of these settings; the others get its word for it."""
    kept = together(lambda: _read_summary(out, settings) if group.leads else None, group.world, group.device)
    found = int(group.world.all_sum(torch.tensor(int(kept is not None), device=group.device)))
    return (kept or {}) if found else None


def _read_summary(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    file = out / SUMMARY
    if not file.exists():
        return None
    kept = json.loads(file.read_text(encoding="utf-8"))
    return kept if all(kept.get(key) == value for key, value in settings.items()) else None


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]evaluate"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _learned(trained: Trained, score: Scorer, progress: Progress) -> ContextGain:
    config = trained.run_config()
    store, plan = Opened(config).rows(config.data.validation)
    batches = evaluation_batches(
        store,
        plan,
        rows=config.validation.rows,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=0,
        dp_size=1,
        objective=make_objective(config, store),
    )
    rows = min(config.validation.rows, plan.num_rows)
    count = -(-rows // config.train.micro_batch_size)
    tracked = progress.track(batches, total=count, description="loss with full and with short context")
    sources = [document for row in range(rows) for document in _documents_of_row(plan, row)]
    # Rows that fill up the last batch are one piece of padding each.
    sources += [-1] * (count * config.train.micro_batch_size - rows)
    return context_gain(trained.network, score, tracked, documents=sources)


def _documents_of_row(plan: Plan, row: int) -> list[int]:
    """The document of each part of a row that attends to itself (its first, when all are one), -1 for padding."""
    pieces = plan.pieces(row)
    padded = int(plan.length[pieces].sum()) < plan.seq_len
    documents = plan.document[pieces].tolist()
    return [*(documents if plan.document_mask else documents[:1]), *([-1] if padded else [])]


def _sweep(trained: Trained, score: Scorer, settings: dict[str, Any], progress: Progress) -> SweepResult:
    config = trained.run_config()
    return run_sweep(
        trained.network,
        score,
        Opened(config).store(config.data.validation.shards),
        trained_seq_len=config.train.seq_len,
        lengths=settings["lengths"],
        methods=settings["methods"],
        token_budget=settings["token_budget"],
        progress=_shown(progress),
    )


def _retrieval(
    trained: Trained, asks: _Asks, trials: Trials, grid: Grid, progress: Progress
) -> RetrievalResult:
    shown = _shown(progress)
    return run_retrieval(trained.network, asks.score, asks.continue_, trials, grid, progress=shown)


def _shown(progress: Progress) -> Report:
    task = progress.add_task("", total=None)

    def show(done: int, total: int, what: str) -> None:
        progress.update(task, completed=done, total=total, description=what)

    return show


def _summary(
    trained: Trained, learned: ContextGain, result: SweepResult, retrieval: RetrievalResult | None
) -> dict[str, Any]:
    config = trained.run_config()
    folders = dict.fromkeys(source.shards for stage in config.data.training for source in stage.sources)
    vocab_size = config.model.vocab_size
    opened = Opened(config)
    share = BASELINE_TOKENS // len(folders)
    training = [x for folder in folders for x in documents(opened.store(folder), most_tokens=share)]
    bigram = KneserNeyBigram.fit(iter(training), vocab_size)
    counted = np.concatenate(training)
    return {
        "checkpoint": str(trained.path),
        "step": trained.step,
        "trained_seq_len": config.train.seq_len,
        "validation_targets": len(learned.targets),
        "validation_loss": learned.validation_loss,
        "baseline_tokens": len(counted),
        "unigram_entropy": unigram_entropy(learned.targets),
        "unigram_loss": unigram_cross_entropy(counted, learned.targets, vocab_size),
        "bigram_loss": bigram.mean_nll(learned.previous, learned.targets),
        "short_context": learned.short_context,
        "short_context_loss": learned.short_context_loss,
        "context_gain": learned.gain.mean,
        "context_gain_interval": [learned.gain.low, learned.gain.high],
        "perplexity": {
            row: {str(length): result.at(row, length).nll.perplexity[0] for length in result.lengths}
            for row in result.rows
        },
        "recalled": {
            method: {str(length): retrieval.recalled(method, length)[0] for length in retrieval.lengths}
            for method in retrieval.methods
        }
        if retrieval
        else None,
    }


def _write_report(
    result: SweepResult,
    retrieval: RetrievalResult | None,
    trained: Trained,
    out: Path,
    run_dir: Path,
    console: Console,
) -> None:
    source = Source(str(trained.path), trained.step, trained.run_config().data.validation.shards)
    # Only a run's own directory has a TensorBoard page to add to.
    tensorboard = run_dir / "tensorboard"
    board = tensorboard if tensorboard.is_dir() else None
    files = write_report(result, source, out, tensorboard_dir=board, retrieval=retrieval)
    console.print(result_table(result))
    if retrieval:
        console.print(retrieval_table(retrieval))
    for sentence in (*findings(result), *(retrieval_findings(retrieval) if retrieval else ())):
        console.print(sentence, markup=False, highlight=False)
    console.print(f"report: {files[0]}", markup=False, highlight=False)
