"""``bench memory``: peak memory of a step against the length of the row, and a line through it. No torch here."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from roformer_dist.bench.harness import Contender, Group, Metric, Sample, check_choice
from roformer_dist.bench.report import Result
from roformer_dist.bench.train import Job, Shape

# Name -> (activation checkpointing, whether the MLP is tiled).
VARIANTS = {
    "plain": ("none", False),
    "tiled MLP": ("none", True),
    "selective": ("selective", False),
    "full": ("full", False),
    "full, tiled MLP": ("full", True),
}
TILE_TOKENS = 1024


@dataclass(frozen=True)
class MemorySettings:
    """What the user chose; ``document`` is the longest document, because time grows with its square."""

    lengths: tuple[int, ...]
    dtype: str
    threads: int
    document: int
    shape: Shape = field(default_factory=Shape)

    def __post_init__(self) -> None:
        check_choice("--dtype", [self.dtype], ("fp32", "bf16"))
        if len(set(self.lengths)) < 3 or min(self.lengths) < 2:
            raise ValueError(
                f"--lengths {list(self.lengths)}: a line needs three lengths, each of at least 2 tokens"
            )


@dataclass(frozen=True)
class Line:
    """Least squares: ``intercept + slope * tokens``; ``residual`` is the largest distance over its value."""

    slope: float
    intercept: float
    residual: float


def above_weights(sample: Sample) -> float:
    """Peak bytes above imports and weights: gradients, activations and what is alive for a moment."""
    return sample.reported["peak_bytes_above_import"] - sample.reported["parameter_bytes"]


METRICS = (
    Metric("peak_above_weights", "peak above weights, MiB", above_weights, lambda v: f"{v / 2**20:,.0f}"),
)


def memory_groups(settings: MemorySettings) -> list[Group]:
    """One group for each length, whose contenders are the variants."""
    return [_group(settings, length) for length in settings.lengths]


def fit(points: Mapping[int, float]) -> Line:
    """The line through bytes by tokens."""
    count = len(points)
    mean_x, mean_y = sum(points) / count, sum(points.values()) / count
    spread = sum((x - mean_x) ** 2 for x in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points.items()) / spread
    intercept = mean_y - slope * mean_x
    residual = max(abs(intercept + slope * x - y) / y for x, y in points.items())
    return Line(slope, intercept, residual)


def fitted_lines(results: Sequence[Result]) -> list[str]:
    """For each variant its bytes per token; lengths at which it failed are left out."""
    lines = []
    for name in VARIANTS:
        points = {
            int(result.group.parameters["length"]): min(above_weights(s) for s in entry.samples)
            for result in results
            for entry in result.measured
            if entry.contender.name == name and entry.samples
        }
        if len(points) < 3:
            lines.append(f"{name}: measured at {len(points)} lengths, too few for a line")
            continue
        line = fit(points)
        lines.append(
            f"{name}: {line.slope:,.0f} bytes a token + {line.intercept / 2**20:,.0f} MiB, "
            f"{min(points):,} to {max(points):,} tokens; largest residual {100 * line.residual:.1f} %"
        )
    return lines


def _group(settings: MemorySettings, length: int) -> Group:
    whole, rest = divmod(length, settings.document)
    documents = (settings.document,) * whole + ((rest,) if rest else ())

    def contender(name: str) -> Contender:
        checkpointing, tiled = VARIANTS[name]
        # The first step: it makes the gradients too. A second one peaks 5 % higher at 4,096 tokens.
        job = Job(
            contender="ours",
            workload="packed",
            documents=documents,
            dtype=settings.dtype,
            threads=settings.threads,
            steps=1,
            warmup_steps=0,
            shape=settings.shape,
            checkpointing=checkpointing,
            mlp_tile_tokens=TILE_TOKENS if tiled else None,
        )
        command = (sys.executable, "-m", "roformer_dist.bench.train_child", job.to_json())
        return Contender(name, "ours" if name == "plain" else "floor", command, reports=True)

    title = (
        f"causal LM; {length:,} tokens in documents of {min(length, settings.document):,}, {settings.dtype}"
    )
    return Group(title, {"length": length, "documents": list(documents)}, [contender(n) for n in VARIANTS])
