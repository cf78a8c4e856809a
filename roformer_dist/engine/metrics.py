"""Numbers of a run: metrics.jsonl, TensorBoard, and what the machine spends."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from roformer_dist.config.data import ClassificationObjective, MaskedObjective, Objective
from roformer_dist.config.layers import layer_kind
from roformer_dist.config.model import ModelConfig
from roformer_dist.data.files import atomic_file


class MetricsLog:
    """One point per key and step, in metrics.jsonl and TensorBoard; a resumed run leaves no duplicates.

    Args:
        run_dir: the run's directory.
        resume_step: steps already finished; points after it came from steps that will be done again
            and are dropped, as is a line that a kill cut short.
    """

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = run_dir / "metrics.jsonl"
        _drop_after(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write ``values`` at ``step``; keys become ``section/key`` tags as they are."""
        line = {"step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def text(self, step: int, tag: str, text: str) -> None:
        """Show ``text`` unformatted on TensorBoard's text page."""
        indented = "\n".join("    " + line for line in text.splitlines())
        self._writer.add_text(tag, indented, step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._writer.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The points of metrics.jsonl in order; a last line cut short is left out."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    points = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            point = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(point, dict) and "step" in point:
            points.append(point)
    return points


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [point for point in read_metrics(path.parent) if point["step"] <= step]
    with atomic_file(path) as file:
        file.write("".join(json.dumps(point) + "\n" for point in kept).encode())


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Peak memory of this process in GiB: host, and device where there is one."""
    # Linux counts in KiB, macOS in bytes.
    unit = 2**30 if sys.platform == "darwin" else 2**20
    values = {"memory_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if device.type == "cuda":
        values["memory_device_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return values


def flops_per_token(model: ModelConfig, lengths: Sequence[int], objective: Objective) -> float:
    """Floating-point operations of one trained token: forward and backward, 2 per multiply-add.

    Matrix products cost 6 per weight. Softmax attention costs 12 per visible key and query dimension. What a
    query sees is the area under its mask: causal, half of its document; in a sliding layer, what of that lies
    within the window. A linear layer costs what its recurrence does, 6 per number of a head's state, once for each
    key head (which writes it) and once for each query head (which reads it), whatever the length. Work that
    another way of computing adds is not the model's: tiles of a kernel, chunks of linear attention, recomputation.
    The output layer counts at the tokens to predict: all of a causal model's, ``mask_probability`` of a masked one's,
    none of a classifier's, whose head works on whole rows.

    Args:
        lengths: tokens of each document piece; the mean over their tokens is returned.
    """
    width, head = model.hidden_size, model.head_size
    projections = 2 * width * head * (model.num_heads + model.kv_heads)
    mlp = (3 if model.mlp == "swiglu" else 2) * width * model.intermediate_size
    weights = model.num_layers * (projections + mlp) + _outer_weights(model, objective)
    masked = objective.kind != "causal"
    attention = 0.0
    for layer in range(model.num_layers):
        kind = layer_kind(model, layer)
        if kind == "linear":
            attention += 6 * head * head * (model.num_heads + model.kv_heads)
        else:
            window = model.sliding_window if kind == "sliding" else None
            attention += 12 * model.num_heads * head * _visible_keys(lengths, window, masked=masked)
    return 6 * weights + attention


def _outer_weights(model: ModelConfig, objective: Objective) -> float:
    """Weights outside the blocks that a token is multiplied with: projection of the embedding, and output layer."""
    outer, hidden = model.embedding_width, model.hidden_size
    projection = 0 if outer == hidden else outer * hidden
    if isinstance(objective, ClassificationObjective):
        return projection
    masked = isinstance(objective, MaskedObjective)
    predicted = objective.mask_probability if isinstance(objective, MaskedObjective) else 1.0
    transformed = model.transforms_head(masked=masked)
    head = (hidden + model.vocab_size) * outer if transformed else model.vocab_size * hidden
    return projection + predicted * head


def _visible_keys(lengths: Sequence[int], window: int | None, *, masked: bool) -> float:
    """Keys that a query sees, as the mean over all queries."""
    hidden = (0 if window is None else max(n - window, 0) for n in lengths)
    area = sum(n * n - beyond * beyond for n, beyond in zip(lengths, hidden))
    return (area if masked else area / 2) / max(sum(lengths), 1)


def matrix_product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second that this process reaches on a plain matrix product.

    It is what ``mfu`` is a share of: a published peak exists for few devices, and for no share of a CPU.
    """
    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        _synchronise(device)
        start = time.perf_counter()
        torch.matmul(a, a)
        _synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
