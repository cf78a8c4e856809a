"""``bench sequence``: one row over several processes, ours beside DeepSpeed's Ulysses. Nothing here imports torch."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from roformer_dist.bench.harness import Contender, Group, Metric, Sample, Spread, check_choice, ratios
from roformer_dist.bench.report import Result
from roformer_dist.bench.train import Job, Shape

ULYSSES, RING, ALONE = "ours, ulysses", "ours, ring", "one process"
PEERS = {
    "distributed-attention": "DistributedAttention",
    "ulysses-hf": "UlyssesSPAttentionHF",
}
OURS = (ULYSSES, RING, ALONE)
# All contenders have the same weights, tokens and targets: only rounding may differ. (loss, gradient norm)
TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (1e-3, 2e-2)}


@dataclass(frozen=True)
class SequenceSettings:
    """What the user chose."""

    lengths: tuple[int, ...]
    dtypes: tuple[str, ...]
    processes: int
    peers: tuple[str, ...]
    samples: int
    steps: int
    warmup_steps: int
    shape: Shape = field(default_factory=Shape)

    def __post_init__(self) -> None:
        for option, chosen, known in (
            ("--peers", self.peers, PEERS),
            ("--dtype", self.dtypes, TOLERANCES),
        ):
            check_choice(option, chosen, known)
        if not 2 <= self.processes <= self.shape.num_heads or self.shape.num_heads % self.processes:
            raise ValueError(
                f"--processes {self.processes}: at least 2, and a divisor of the model's {self.shape.num_heads} heads, "
                "which the peers cannot share out otherwise"
            )
        if not self.lengths or any(
            length < self.processes or length % self.processes for length in self.lengths
        ):
            raise ValueError(
                f"--lengths {list(self.lengths)}: every length is a multiple of --processes {self.processes}, "
                "because the peers do not pad"
            )


METRICS = (
    Metric(
        "seconds_per_step",
        "s/step",
        lambda s: statistics.median(s.reported["step_seconds"]),
        lambda value: f"{value:.2f}",
    ),
    # Of all processes together: holds on a machine that others use as well, where seconds do not.
    Metric(
        "cpu_seconds_per_step",
        "CPU s",
        lambda s: statistics.median(s.reported["step_cpu_seconds"]),
        lambda value: f"{value:.2f}",
    ),
    Metric(
        "peak_bytes_above_import",
        "peak MiB",
        lambda s: s.reported["peak_bytes_above_import"],
        lambda value: f"{value / 2**20:,.0f}",
    ),
)
NOTES = (
    Metric("loss", "loss", lambda s: s.reported["loss"], lambda value: f"{value:.5f}"),
    Metric("grad_norm", "gradient norm", lambda s: s.reported["grad_norm"], lambda value: f"{value:.5f}"),
)


def sequence_groups(settings: SequenceSettings) -> list[Group]:
    """One group for each dtype and length."""
    return [_group(settings, dtype, length) for dtype in settings.dtypes for length in settings.lengths]


def same_loss(ours: Sample, other: Sample) -> str | None:
    """Why another contender's sample cannot stand beside ours, or None."""
    for key, tolerance in zip(("loss", "grad_norm"), TOLERANCES[ours.reported["dtype"]]):
        mine, theirs = ours.reported[key], other.reported[key]
        if not abs(theirs - mine) <= tolerance * abs(mine):
            return f"{key} {theirs:.6g} against our {mine:.6g}: not the same step"
    return None


def ring_lines(results: Sequence[Result]) -> list[str]:
    """The ratios of our ring, which has no column of its own in the tables."""
    lines = []
    for result in results:
        entries = {entry.contender.name: entry for entry in result.measured}
        for name, entry in entries.items():
            if name in (RING, ULYSSES):
                continue
            shown = [
                f"{metric.label} {spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"
                for metric in result.metrics
                if (spread := Spread.of(ratios(entries[RING], entry, metric)))
            ]
            if shown:
                lines.append(f"{result.group.title}: {RING} ÷ {name}: {', '.join(shown)}")
    return lines


def _missing() -> str | None:
    absent = [name for name in ("deepspeed", "transformers") if importlib.util.find_spec(name) is None]
    return f'{", ".join(absent)}: not installed; pip install "roformer-dist[bench]"' if absent else None


def _group(settings: SequenceSettings, dtype: str, length: int) -> Group:
    missing = _missing() if settings.peers else None

    def contender(name: str) -> Contender:
        processes = 1 if name == ALONE else settings.processes
        # As many threads in all.
        threads = settings.processes // processes
        job = Job(
            name,
            "causal",
            (length,),
            dtype,
            threads,
            settings.steps,
            settings.warmup_steps,
            settings.shape,
        )
        child = ("roformer_dist.bench.sequence_child", job.to_json())
        ranks = ("roformer_dist.bench.ranks", str(processes)) if processes > 1 else ()
        command = (sys.executable, "-m", *ranks, *child)
        if name in OURS:
            return Contender(name, "ours", command, reports=True)
        return Contender(name, "peer", command, missing, reports=True)

    title = f"causal LM, {length:,} tokens, {dtype}; {settings.processes} processes of 1 thread"
    return Group(
        title,
        {"dtype": dtype, "length": length, "processes": settings.processes, "shape": asdict(settings.shape)},
        [contender(name) for name in (*OURS, *(PEERS[peer] for peer in settings.peers))],
        check=same_loss,
    )
