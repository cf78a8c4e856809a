"""``bench data``: packed rows of one corpus into training batches, ours beside streaming data sets."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from roformer_dist.bench.harness import Contender, Group, Limits, Metric, Sample, check_choice
from roformer_dist.bench.report import Result
from roformer_dist.bench.run import Plan, run_benchmark
from roformer_dist.data.plan import Plan as PackedPlan
from roformer_dist.data.plan import load_plans
from roformer_dist.data.store import ShardStore

SCRIPT = Path(__file__).with_name("data_peers.py")
# Contender -> what packs its rows, and what it checks.
HABITS = {
    "ours": "packs while reading, from its plan; checks the crc32 of every block of tokens it delivers",
    "webdataset": "given packed rows; checks nothing",
    "mosaicml-streaming": "given packed rows; checks a shard's hash when it downloads one, if asked; here nothing",
    "litdata": "given packed rows; checks nothing",
    "megatron-energon": "given packed rows (packing hooks exist); checks nothing",
}
MODULES = {
    "webdataset": "webdataset",
    "mosaicml-streaming": "streaming",
    "litdata": "litdata",
    "megatron-energon": "megatron.energon",
}


@dataclass(frozen=True)
class DataSettings:
    """What the user chose; ``pythons`` is the interpreter of each peer that does not use ours."""

    shards: str
    plan: str
    peers: tuple[str, ...] = tuple(MODULES)
    pythons: Mapping[str, str] = field(default_factory=dict)
    batch: int = 8
    epochs: int = 3
    samples: int = 3

    def __post_init__(self) -> None:
        for option, names in (("--peers", self.peers), ("--peer-python", self.pythons)):
            check_choice(option, names, MODULES)

    def python(self, peer: str) -> str:
        """The interpreter that runs a peer."""
        return str(self.pythons.get(peer, sys.executable))


def _rate(key: str) -> Any:
    return lambda sample: sample.reported["tokens"] / sample.reported[key]


def _millions(value: float) -> str:
    return f"{value / 1e6:,.1f}"


METRICS = (
    Metric("warm_tokens_per_second", "warm M/s", _rate("warm_seconds"), _millions),
    Metric("warm_tokens_per_cpu_second", "per CPU s", _rate("warm_cpu_seconds"), _millions),
    Metric("cold_tokens_per_second", "cold M/s", _rate("cold_seconds"), _millions),
    Metric("peak_bytes", "peak MiB", lambda sample: sample.peak, lambda value: f"{value / 2**20:,.0f}"),
)


def run_data(settings: DataSettings, timeout: float, json_file: Path | None) -> int:
    """Give the rows to every peer in its own format, measure in turn; see ``run_benchmark``.

    Raises:
        DataError: shards and plan do not belong together, or the plan has rows of several lengths.
        ValueError: fewer rows than a batch.
    """
    store, plans = ShardStore(settings.shards), load_plans(settings.plan)
    if len(plans) > 1:
        raise ValueError(
            f"--plan {settings.plan}: rows of {len(plans)} lengths; name the plan of one of them"
        )
    (plan,) = plans
    plan.check_store(store)
    if plan.num_rows < settings.batch:
        raise ValueError(f"--batch {settings.batch}: the plan has {plan.num_rows} rows; lower it")
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        rows = plan.num_rows // settings.batch * settings.batch
        write_rows(store, plan, Path(folder))
        title = (
            f"{rows:,} rows of {plan.seq_len:,} tokens, {settings.batch} a batch: ids, labels and positions; "
            ""
            "one process, no workers; M = million tokens"
        )
        contenders = [_ours(settings), *(_peer(name, settings, Path(folder)) for name in settings.peers)]
        group = Group(title, {"rows": rows, "seq_len": plan.seq_len}, contenders, check=same_rows)
        bench = Plan(
            "data",
            [group],
            METRICS,
            {**asdict(settings), "timeout": timeout, "plan_hash": plan.hash, "manifest_root": store.root},
            samples=settings.samples,
            warmup_rounds=0,
            limits=Limits(timeout),
            environment={"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            conclude=habits,
        )
        return run_benchmark(bench, json_file)


def write_rows(store: ShardStore, plan: PackedPlan, folder: Path) -> None:
    """The plan's rows as arrays that every peer's format is made from; padding is a document of its own."""
    dtype = np.dtype(store.manifest.dtype)
    rows = np.lib.format.open_memmap(folder / "rows.npy", "w+", dtype, (plan.num_rows, plan.seq_len))
    lengths, offsets = [], [0]
    for row in range(plan.num_rows):
        pieces = plan.pieces(row)
        sizes, end = plan.length[pieces].tolist(), 0
        for document, start, size in zip(plan.document[pieces].tolist(), plan.start[pieces].tolist(), sizes):
            rows[row, end : end + size] = store.read_stored(document, start, size)
            end += size
        rows[row, end:] = store.manifest.pad_id
        lengths += [*sizes, plan.seq_len - end] if end < plan.seq_len else sizes
        offsets.append(len(lengths))
    rows.flush()
    np.save(folder / "lengths.npy", np.array(lengths, dtype=np.int32))
    np.save(folder / "offsets.npy", np.array(offsets))


def same_rows(ours: Sample, peer: Sample) -> str | None:
    """Why a peer's sample cannot stand beside ours, or None; the last batch of an epoch may be short."""
    mine, theirs = ours.reported["rows"], peer.reported["rows"]
    if abs(theirs - mine) > 0.01 * mine:
        return f"{theirs:,} rows against our {mine:,}: not the same work"
    means = [sample.reported["sum"] / sample.reported["tokens"] for sample in (ours, peer)]
    if abs(means[1] / means[0] - 1) > 0.01:
        return f"a mean token of {means[1]:.1f} against our {means[0]:.1f}: not the same rows"
    return None


def habits(results: Sequence[Result]) -> list[str]:
    """A line for each contender that was measured: version, what packs its rows, what it checks."""
    return [
        f"{entry.contender.name} {entry.samples[0].reported['version']}: {HABITS[entry.contender.name]}"
        for result in results
        for entry in result.measured
        if entry.samples
    ]


def _ours(settings: DataSettings) -> Contender:
    numbers = (str(settings.batch), str(settings.epochs))
    command = (sys.executable, "-m", "roformer_dist.bench.data_child", settings.shards, settings.plan)
    return Contender("ours", "ours", (*command, *numbers), reports=True)


def _peer(name: str, settings: DataSettings, folder: Path) -> Contender:
    """A peer with its rows written; ``missing`` says why where that cannot be."""
    python, missing = settings.python(name), None
    if trouble := _trouble([python, "-c", f"import {MODULES[name]}"]):
        missing = (
            f"{name}: not installed for {python} ({trouble}); pip install {name} in an environment of its own and "
            f"give --peer-python {name}=PATH"
        )
    elif trouble := _trouble([python, "-P", str(SCRIPT), "prepare", name, str(folder)]):
        missing = f"{name}: could not write the rows in its format: {trouble}"
    numbers = (str(settings.batch), str(settings.epochs))
    command = (python, "-P", str(SCRIPT), "read", name, str(folder), *numbers)
    return Contender(name, "peer", command, missing, reports=True)


def _trouble(command: list[str]) -> str | None:
    """The last line that a command that failed said; None for one that did not."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    except OSError as error:
        return error.strerror or str(error)
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return (lines[-1] if lines else f"exit code {done.returncode}") if done.returncode else None
