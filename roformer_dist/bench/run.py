"""A benchmark from its plan to its table, its JSON and its exit code."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from roformer_dist.bench import gpu, machine, memory, sequence, tokenize, train
from roformer_dist.bench.harness import Group, Limits, Metric, check_choice, run_group
from roformer_dist.bench.report import Result, as_json, remarks, result_table, write_json


@dataclass(frozen=True)
class Plan:
    """What to measure and how.

    Attributes:
        name: of the benchmark.
        groups: measured one after the other; inside each, contenders take turns.
        metrics: compared; ``notes`` are only shown.
        parameters: the exact settings, for the JSON.
        samples, warmup_rounds: rounds that count, and rounds before them.
        environment: variables of every sample.
        conclude: lines that say something about all groups together, printed and written at the end.
    """

    name: str
    groups: Sequence[Group]
    metrics: Sequence[Metric]
    parameters: Mapping[str, Any]
    samples: int
    warmup_rounds: int
    limits: Limits
    notes: Sequence[Metric] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    conclude: Callable[[Sequence[Result]], list[str]] = lambda results: []


def train_plan(settings: train.TrainSettings, timeout: float, memory_limit: float | None) -> Plan:
    """``bench train``; without a limit in GiB, a process may take what is available now."""
    memory = int(memory_limit * 2**30) if memory_limit else psutil.virtual_memory().available
    return Plan(
        "train",
        train.train_groups(settings),
        train.METRICS,
        {**asdict(settings), "timeout": timeout, "memory_limit_bytes": memory},
        samples=settings.samples,
        # Each process warms up by itself.
        warmup_rounds=0,
        limits=Limits(timeout, memory),
        notes=train.NOTES,
        environment=_environment(settings.threads),
    )


def sequence_plan(settings: sequence.SequenceSettings, timeout: float) -> Plan:
    """``bench sequence``."""
    return Plan(
        "sequence",
        sequence.sequence_groups(settings),
        sequence.METRICS,
        {**asdict(settings), "timeout": timeout},
        samples=settings.samples,
        # Each process warms up by itself.
        warmup_rounds=0,
        limits=Limits(timeout),
        notes=sequence.NOTES,
        # Threads are set by each rank.
        environment={**_environment(1), "DS_ACCELERATOR": "cpu"},
        conclude=sequence.ring_lines,
    )


def memory_plan(settings: memory.MemorySettings, timeout: float) -> Plan:
    """``bench memory``: one sample of each variant and length, because memory hardly varies."""
    return Plan(
        "memory",
        memory.memory_groups(settings),
        memory.METRICS,
        {**asdict(settings), "timeout": timeout},
        samples=1,
        warmup_rounds=0,
        limits=Limits(timeout, psutil.virtual_memory().available),
        # Large tensors go back to the system when they are freed, so that the peak is what was alive at a time and
        # not what glibc's heap had kept.
        environment={**_environment(settings.threads), "MALLOC_MMAP_THRESHOLD_": str(2**20)},
        conclude=memory.fitted_lines,
    )


def gpu_plan(tasks: Sequence[str], samples: int, timeout: float) -> Plan:
    """``bench gpu``.

    Raises:
        ValueError: there is no CUDA device, or a task is not known.
    """
    import torch

    from roformer_dist.kernels.attention import flash_attn_missing

    check_choice("--tasks", tasks, gpu.TASKS)
    if not torch.cuda.is_available():
        raise ValueError("bench gpu: this machine has no CUDA device, or this build of PyTorch no CUDA")
    missing = {}
    if trouble := flash_attn_missing(torch.device("cuda")):
        missing["flash_attn"] = trouble
    if importlib.util.find_spec("transformers") is None:
        missing["hf-llama"] = train.NOT_INSTALLED
    return Plan(
        "gpu",
        gpu.gpu_groups(tasks, missing, timeout),
        gpu.METRICS,
        {"tasks": list(tasks), "samples": samples, "timeout": timeout, "gpu": torch.cuda.get_device_name()},
        samples=samples,
        warmup_rounds=0,
        limits=Limits(timeout),
        notes=gpu.NOTES,
        environment={"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        conclude=gpu.summary,
    )


def _environment(threads: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def run_tokenize(
    settings: tokenize.TokenizeSettings, samples: int, timeout: float, json_file: Path | None
) -> int:
    """``bench tokenize``, on a corpus that is laid out first."""
    with tempfile.TemporaryDirectory() as folder:
        facts = tokenize.prepare(settings, Path(folder))
        plan = Plan(
            "tokenize",
            tokenize.tokenize_groups(settings, Path(folder), facts),
            tokenize.METRICS,
            {**asdict(settings), "tokenizer": str(settings.tokenizer or ""), "timeout": timeout},
            samples=samples,
            # Each encoder warms up by itself.
            warmup_rounds=0,
            limits=Limits(timeout),
            notes=tokenize.NOTES,
            environment={"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )
        return run_benchmark(plan, json_file)


def run_benchmark(plan: Plan, json_file: Path | None, console: Console | None = None) -> int:
    """Measure, print, write; 0, or 1 when a contender failed (a missing peer is no failure)."""
    console = console or Console()
    if json_file and not json_file.absolute().parent.is_dir():
        raise ValueError(f"--json {json_file}: its directory does not exist; create it first")
    facts = {
        "date": machine.now(),
        "machine": machine.describe_machine(),
        "versions": machine.describe_versions(),
    }
    _print_facts(facts, console)
    results: list[Result] = []
    with _progress() as progress:
        turns = sum(len(group.contenders) for group in plan.groups) * (plan.samples + plan.warmup_rounds)
        task = progress.add_task("", total=turns)
        # The bar moves when a turn is over, that is when the next one begins.
        taken = iter(range(turns))
        for group in plan.groups:
            measured = run_group(
                group,
                rounds=plan.samples,
                warmups=plan.warmup_rounds,
                limits=plan.limits,
                environment=plan.environment,
                advance=lambda name: progress.update(task, completed=next(taken), description=name),
            )
            results.append(Result(group, measured, plan.metrics))
            console.print(result_table(results[-1], notes=plan.notes))
    conclusions = plan.conclude(results)
    for line in conclusions:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    # A peer that is missing is so in every group: said once.
    for line in dict.fromkeys(remark for result in results for remark in remarks(result)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if json_file:
        content = as_json(plan.name, results, parameters=plan.parameters, facts=facts)
        write_json(json_file, {**content, "conclusions": conclusions})
        console.print(f"figures: {json_file}", markup=False, highlight=False, soft_wrap=True)
    return int(any(entry.failure for result in results for entry in result.measured))


def _print_facts(facts: Mapping[str, Any], console: Console) -> None:
    host = facts["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    console.print(
        f"{host['cpu']}, {host['usable_cores']} cores, {host['memory_bytes'] / 2**30:.0f} GiB, "
        f"load {' '.join(map(str, host['load_average']))} at the start, {facts['date']}\n{versions}\n"
        "medians (smallest to largest); ours ÷ it: median of the pairs of one round",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _progress() -> Progress:
    return Progress(
        TextColumn("[bold]bench"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
