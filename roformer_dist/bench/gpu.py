"""``bench gpu``: every GPU figure in one call, one process for each. Nothing here imports torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from roformer_dist.bench.harness import Contender, Group, Metric, Sample
from roformer_dist.bench.report import Result


@dataclass(frozen=True)
class GpuModel:
    """A decoder of 1.09 B parameters with heads of 128, unless changed."""

    vocab_size: int = 65536
    hidden_size: int = 2048
    num_layers: int = 16
    num_heads: int = 16
    num_kv_heads: int = 16
    head_dim: int = 128
    intermediate_size: int = 5632

    @property
    def matrix_weights(self) -> int:
        """Weights that every token is multiplied with: all but the embedding."""
        heads = 2 * self.head_dim * (self.num_heads + self.num_kv_heads)
        block = self.hidden_size * (heads + 3 * self.intermediate_size)
        return self.num_layers * block + self.vocab_size * self.hidden_size

    def step_flops(self, tokens: int, *, causal_halved: bool) -> float:
        """Forward and backward of one document: 6 a weight, 12 a visible key and query dimension.

        The full convention counts the hidden half of the scores as work; it makes long contexts look busier.
        """
        visible = tokens / 2 if causal_halved else tokens
        attention = 12 * self.num_layers * self.num_heads * self.head_dim * visible
        return tokens * (6 * self.matrix_weights + attention)


@dataclass(frozen=True)
class GpuJob:
    """One sample; the child gets it as JSON.

    Attributes:
        task: one of ``TASKS``.
        contender: a kernel for ``numerics`` and ``attention``; a name for ``spread``; ``ours`` or ``hf-llama`` for the
            others.
        tokens: of one causal document; for ``longest`` the first length tried.
        steps, warmups: runs of the work that count, and runs before them.
        checkpointing, mlp_tile_tokens, offload: ours only; Llama checkpoints its layers, if ``full``.
        ulysses_size, ring_size: the in-process ranks of ``spread``.
        limit_s: of ``longest``, which tries nothing that would take it beyond so many seconds.
    """

    task: str
    contender: str
    tokens: int
    model: GpuModel = GpuModel()
    steps: int = 3
    device: str = "cuda"
    checkpointing: str = "selective"
    mlp_tile_tokens: int | None = 8192
    offload: bool = False
    ulysses_size: int = 1
    ring_size: int = 1
    warmups: int = 2
    limit_s: float = 600.0

    def to_json(self) -> str:
        """For ``from_json`` in another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> GpuJob:
        """The job that ``to_json`` wrote."""
        values = json.loads(text)
        return cls(**{**values, "model": GpuModel(**values["model"])})


METRICS = (
    Metric("tera_flops", "TFLOP/s, causal half", lambda s: s.reported["tera_flops"], "{:.1f}".format),
    Metric("share", "of matmul rate", lambda s: s.reported["share"], "{:.1%}".format),
    Metric("tokens_per_second", "tokens/s", lambda s: s.reported["tokens_per_second"], "{:,.0f}".format),
    Metric("peak_gib", "peak GiB", lambda s: s.reported["peak_gib"], "{:.1f}".format),
)
NOTES = (
    Metric("full_share", "share, full convention", lambda s: s.reported["full_share"], "{:.1%}".format),
    Metric("matmul", "matmul TFLOP/s", lambda s: s.reported["matmul_tera_flops"], "{:.0f}".format),
    Metric("longest", "tokens", lambda s: s.reported["tokens"], "{:,.0f}".format),
)
# Kernels against float64 and the clock; a row over in-process ranks; a decoder's step; bisection on the length.
TASKS = ("numerics", "attention", "spread", "step", "longest")
ATTENTION_TOKENS = (4096, 8192, 16384, 32768, 65536, 131072)
SPREAD_TOKENS = (32768, 131072)
MESHES = ((1, 1), (1, 4), (1, 8), (4, 2), (2, 4))  # ulysses_size, ring_size
# Of bf16 results merged in float32 and rounded once, where one call rounds once.
SPREAD_TOLERANCE = 1e-2
STEP_TOKENS = (8192, 32768, 131072)
# A step's seconds by the measured rates of its matrix products and attention over those it takes; and the causal
# share of the matrix rate, at these lengths.
CEILING_TARGET, MFU_TARGET, MFU_TOKENS = 0.85, 0.5, (32768, 131072)
KERNELS = ("varlen", "flash_attn")


def gpu_groups(tasks: Sequence[str], missing: dict[str, str], timeout: float = 900.0) -> list[Group]:
    """The groups of ``tasks``; ``missing`` says of a contender why it cannot run here, ``timeout`` ends a sample."""
    groups = []
    if "numerics" in tasks:
        jobs = [GpuJob("numerics", kernel, ATTENTION_TOKENS[0]) for kernel in KERNELS]
        groups.append(_group("numerics, and the kernel alone at 4,096 tokens", jobs, missing))
    if "attention" in tasks:
        for tokens in ATTENTION_TOKENS:
            jobs = [GpuJob("attention", kernel, tokens) for kernel in KERNELS]
            groups.append(
                _group(f"RoPE and causal attention, forward and backward, {tokens:,} tokens", jobs, missing)
            )
    if "spread" in tasks:
        groups += [spread_group(tokens) for tokens in SPREAD_TOKENS]
    if "step" in tasks:
        groups += [_step_group(tokens, missing) for tokens in STEP_TOKENS]
    if "longest" in tasks:
        groups += _long_groups(missing, timeout)
    return groups


def _step_group(tokens: int, missing: dict[str, str]) -> Group:
    # The same work on both sides: every layer run twice, where Llama needs that to fit.
    how = "none" if tokens <= 8192 else "full"
    jobs = [GpuJob("step", name, tokens, checkpointing=how) for name in ("ours", "hf-llama")]
    if how == "full":
        jobs += [GpuJob("step", "ours", tokens, checkpointing=other) for other in ("selective", "none")]
    # Where a block keeps all, its MLP does too: nothing is computed twice.
    jobs = [replace(job, mlp_tile_tokens=None) if job.checkpointing == "none" else job for job in jobs]
    return _group(f"1B decoder, forward and backward, {tokens:,} tokens, checkpointing {how}", jobs, missing)


def _long_groups(missing: dict[str, str], timeout: float) -> list[Group]:
    kept: dict[str, Any] = {"checkpointing": "full", "offload": True}
    once: dict[str, Any] = {**kept, "steps": 1, "warmups": 0}
    # The rest of the time is for what takes longer than it was foreseen to.
    search: dict[str, Any] = {**kept, "limit_s": timeout * 0.75}
    small = GpuModel(num_layers=4)
    quarter = "4 of the 16 layers at full width"
    peer = GpuJob("longest", "hf-llama", 16384, **{**search, "offload": False})
    of = "1B decoder, fp32 moments not counted"
    return [
        _group(f"524,288 tokens, one step, {of}", [GpuJob("step", "ours", 2**19, **once)], missing),
        _group(
            f"1,048,576 tokens, one step, {quarter}", [GpuJob("step", "ours", 2**20, small, **once)], missing
        ),
        _group(f"longest row that trains, {of}", [GpuJob("longest", "ours", 65536, **search), peer], missing),
        _group(
            f"longest row that trains, {quarter}",
            [GpuJob("longest", "ours", 131072, small, **search)],
            missing,
        ),
    ]


def spread_group(tokens: int, **changes: Any) -> Group:
    """One row over the ranks of each of ``MESHES``; the first is one call, what its ratios vary by is noise."""
    jobs = [
        GpuJob("spread", _mesh_name(*mesh), tokens, ulysses_size=mesh[0], ring_size=mesh[1], **changes)
        for mesh in MESHES
    ]
    title = f"kernel calls of a row over in-process ranks, forward and backward, {tokens:,} tokens"
    return replace(_group(title, jobs, {}), check=near_one_call)


def near_one_call(_ours: Sample, other: Sample) -> str | None:
    """Why a mesh's sample computes something else than one call, or None."""
    for name, error in other.reported["errors"].items():
        if not error <= SPREAD_TOLERANCE:
            return f"{name} differs from one call's by {error:.2g} of its norm, more than {SPREAD_TOLERANCE}"
    return None


def _mesh_name(ulysses_size: int, ring_size: int) -> str:
    if ulysses_size == ring_size == 1:
        return "one call"
    return f"ring {ring_size}" if ulysses_size == 1 else f"ulysses {ulysses_size} x ring {ring_size}"


def summary(results: Sequence[Result]) -> list[str]:
    """The targets of docs/benchmarks.md beside what was measured."""
    lines = []
    for result in results:
        for entry in result.measured:
            name = entry.contender.name
            for sample in entry.samples[-1:]:
                lines.append(f"{result.group.title}: {name}: {_figures(sample)}")
                lines += [f"{name} against float64, {line}" for line in _numerics(sample)]
                if "of_ceiling" in sample.reported:
                    lines.append(f"{name}, {_ceiling(sample, targets=name.startswith('ours'))}")
    return lines


def _numerics(sample: Sample) -> list[str]:
    """Errors by dtype and head_dim, of the largest value of each tensor."""
    return [
        f"{dtype}, head_dim {head_dim}: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        for dtype, by_head_dim in sample.reported.get("numerics", {}).items()
        for head_dim, errors in by_head_dim.items()
    ]


def _ceiling(sample: Sample, *, targets: bool) -> str:
    said = sample.reported
    matmul, kernel = said["matmul_tera_flops"], said["kernel_tera_flops"]
    line = (
        f"{said['tokens']:,} tokens: {said['of_ceiling']:.2f} of the ceiling, which is {said['ceiling_seconds']:.3g} s "
        f"with matrix products at {matmul:.0f} and attention at {kernel:.0f} TFLOP/s"
    )
    if not targets:
        return line
    line += f"; target {CEILING_TARGET}: {_met(said['of_ceiling'] >= CEILING_TARGET)}"
    if said["tokens"] in MFU_TOKENS:
        line += (
            f"; causal MFU {said['share']:.1%}, target {MFU_TARGET:.0%}: {_met(said['share'] >= MFU_TARGET)}"
        )
    return line


def _met(met: bool) -> str:
    return "met" if met else "missed"


def _figures(sample: Sample) -> str:
    said = sample.reported
    if "hop_efficiency" in said:
        ways = (" ".join(f"{hop:.2f}" for hop in way) for way in said["hop_efficiency"])
        hops = "hop by hop {} forward, {} backward".format(*ways)
        return (
            f"{said['efficiency']:.2f} of one call's rate, {hops}; "
            f"largest difference {max(said['errors'].values()):.1e}, {said['peak_gib']:.1f} GiB"
        )
    bound = {"memory": ", more do not fit", "time": ", more would take too long"}.get(
        said.get("bound", ""), ""
    )
    return (
        f"{said['tokens']:,} tokens{bound}, {said['tera_flops']:.1f} TFLOP/s, {said['share']:.1%} of the matrix rate "
        f"({said['full_share']:.1%} in the full convention), {said['tokens_per_second']:,.0f} tokens/s, "
        f"{said['peak_gib']:.1f} GiB"
    )


def _group(title: str, jobs: Sequence[GpuJob], missing: dict[str, str]) -> Group:
    contenders = []
    for index, job in enumerate(jobs):
        command = (sys.executable, "-m", "roformer_dist.bench.gpu_child", job.to_json())
        again = any(job.contender == earlier.contender for earlier in jobs[:index])
        name = f"{job.contender} {job.checkpointing}" if again else job.contender
        contenders.append(
            Contender(name, "peer" if index else "ours", command, missing.get(job.contender), reports=True)
        )
    return Group(title, {"jobs": [asdict(job) for job in jobs]}, contenders)
