"""Mesh against one process: run both, compare, and what the table says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from roformer_dist.config import Config
from roformer_dist.engine.agreement import together
from roformer_dist.kernels.attention import Kernel, choose_kernel
from roformer_dist.kernels.reference import ReferenceKernel
from roformer_dist.parallel.comm import Comm
from roformer_dist.parallel.in_process import run_in_process
from roformer_dist.parallel.mesh import Mesh, build_mesh
from roformer_dist.parallel.sequence_ops import sequence_ops
from roformer_dist.parity.compare import Check, Outcome, compare_bf16, compare_exactly, compare_fp32, worst
from roformer_dist.parity.mesh import on_mesh
from roformer_dist.parity.problem import Problem, make_problem
from roformer_dist.parity.reference import one_process
from roformer_dist.parity.replica import PlainReplica

# bf16 rounds by chance: its errors are taken over several weights and rows.
BF16_SEEDS = (0, 1, 2)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Report:
    """What was compared and how it went.

    Attributes:
        checks: by precision.
        facts: what was run, in words.
    """

    checks: dict[str, list[Check]]
    facts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """The inverse of ``dataclasses.asdict``."""
        checks = {name: [Check(**check) for check in found] for name, found in values["checks"].items()}
        return cls(checks, values["facts"])

    @property
    def passed(self) -> bool:
        """Whether every check is within its bound."""
        return all(check.passed for checks in self.checks.values() for check in checks)

    def rows(self) -> list[dict[str, Any]]:
        """For each precision and kind of comparison the worst one."""
        rows = []
        for precision, checks in self.checks.items():
            for kind in dict.fromkeys(check.kind for check in checks):
                those = [check for check in checks if check.kind == kind]
                chosen = worst(those)
                rows.append(
                    {
                        "precision": precision,
                        "compared": kind,
                        "count": len(those),
                        "failed": sum(not check.passed for check in those),
                        "worst": chosen.name,
                        "error": chosen.error,
                        "allowed": chosen.allowed,
                    }
                )
        return rows


# Trains a problem in a precision on all ranks; None on ranks that are not told the outcome.
MeshRun = Callable[[Problem, str], Outcome | None]


def check_all(
    config: Config,
    precisions: list[str],
    dp_size: int,
    run: MeshRun,
    kernel: Kernel,
    device: torch.device,
    world: Comm | None = None,
) -> Report | None:
    """Run the mesh and, where its outcome is told, the reference; None elsewhere.

    With ``world``, all of its ranks fail together if the reference does.
    """
    checks: dict[str, list[Check]] = {}
    for precision in precisions:
        seeds = BF16_SEEDS if precision == "bf16" else BF16_SEEDS[:1]
        problems = [make_problem(config, dp_size=dp_size, seed=seed) for seed in seeds]
        found = [outcome for problem in problems if (outcome := run(problem, precision))]
        compare = partial(_compare, problems, found, precision, kernel, device)
        checks[precision] = together(compare, world, device) if world else compare()
    if not any(checks.values()):
        return None
    return Report(checks, _facts(make_problem(config, dp_size=dp_size)))


def check_in_process(config: Config, precisions: list[str], dp_size: int) -> Report:
    """The mesh as threads of this process, each rank in plain PyTorch: no DeepSpeed, any size."""
    kernel = kernel_here(config)

    def run(problem: Problem, precision: str) -> Outcome:
        def rank(world: Comm) -> Outcome:
            mesh = _mesh(world, config)
            ops, layout = sequence_ops(kernel, mesh, config.parallel.head_chunks)
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            replica = PlainReplica(problem.config, ops, world, dtype, CPU, problem.seed)
            return on_mesh(problem, mesh, layout, replica, CPU)

        return run_in_process(dp_size * config.parallel.sp_size, rank)[0]

    with one_thread():
        report = check_all(config, precisions, dp_size, run, kernel, CPU)
    assert report is not None
    return report


def precisions_of(config: Config) -> list[str]:
    """float32, and bf16 where the configuration may train in it."""
    may = config.train.precision != "fp32" and config.parallel.zero_stage > 0
    return ["fp32", "bf16"] if may else ["fp32"]


def kernel_here(config: Config) -> Kernel:
    """The job's kernel where this processor has it: the reference runs anywhere, others are the CPU's."""
    return choose_kernel("reference" if config.train.kernel == "reference" else "auto", CPU)[0]


@contextmanager
def one_thread() -> Iterator[None]:
    """Without threads inside operations: these are too small for it, and the ranks are threads already."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _mesh(world: Comm, config: Config) -> Mesh:
    return build_mesh(world, ulysses_size=config.parallel.ulysses, ring_size=config.parallel.ring_size)


def _compare(
    problems: list[Problem], found: list[Outcome], precision: str, kernel: Kernel, device: torch.device
) -> list[Check]:
    if not found:
        return []
    if precision == "fp32":
        reference = one_process(problems[0], kernel, torch.float32, device)
        return compare_exactly(found[0], reference) + compare_fp32(found[0], reference)
    # A row's class is one target: features, their sum, the dense layer's and the logits are rounded each.
    roundings = 4 if problems[0].config.objective.kind == "classification" else 1
    alone = [one_process(problem, kernel, torch.bfloat16, device) for problem in problems]
    exact = [one_process(problem, ReferenceKernel(), torch.float64, device) for problem in problems]
    return compare_exactly(found[0], exact[0]) + compare_bf16(found, alone, exact, roundings)


def _facts(problem: Problem) -> dict[str, str]:
    config = problem.config
    parallel, model = config.parallel, config.model
    return {
        "mesh": f"dp {problem.dp_size} x sp {parallel.sp_size} (Ulysses {parallel.ulysses} x ring "
        f"{parallel.ring_size}, head_chunks {parallel.head_chunks})",
        "model": f"{model.num_layers} layers, {model.num_heads} heads on {model.kv_heads}, of {model.head_size}; "
        f"rows of {config.train.seq_len} tokens, {config.train.tokens_per_step // config.train.seq_len} a step"
        + (f", {problem.rows_per_step} of them different" if problem.dp_size > problem.own else ""),
        "documents": problem.documents,
    }
