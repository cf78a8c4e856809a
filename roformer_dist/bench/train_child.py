"""One sample of ``bench train``: build, warm up, time, and print the figures as a line of JSON."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from roformer_dist.bench.train import Job
from roformer_dist.bench.work import Work, draw_work

# A step: forward and backward over the row; returns the mean loss of its targets.
Step = Callable[[], float]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(job: Job) -> None:
    """Run the job in this process, which must be fresh: memory is counted from here."""
    torch.set_num_threads(job.threads)
    build = load_contender(job.contender)
    work = draw_work(job)
    reset_peak()
    baseline = peak_bytes()
    # Both sides draw from the same seed; the losses of variants of one peer can then be compared.
    torch.manual_seed(job.seed)
    network, step = build(job, work)
    losses, seconds, cpu_seconds = [], [], []
    for _ in range(job.warmup_steps + job.steps):
        network.zero_grad(set_to_none=True)
        start, cpu_start = time.perf_counter(), time.process_time()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    figures = {
        "tokens": job.length,
        "targets": work.targets,
        "loss": losses[-1],
        "step_seconds": seconds[job.warmup_steps :],
        "step_cpu_seconds": cpu_seconds[job.warmup_steps :],
        "peak_bytes_above_import": peak_bytes() - baseline,
        "import_bytes": baseline,
        "parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "parameter_bytes": sum(p.numel() * p.element_size() for p in network.parameters()),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(figures))


def load_contender(name: str) -> Callable[[Job, Work], tuple[nn.Module, Step]]:
    """What builds the network and its step, with everything that it needs imported."""
    if name == "ours":
        from roformer_dist.bench.ours import build

        return build
    from roformer_dist.bench.peers import BUILDERS

    return BUILDERS[name]


def reset_peak() -> None:
    """Count peak memory from what this process holds now."""
    # Linux: the peak of this process starts again from what it holds now. Elsewhere that of the imports stays in.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most resident memory of this process since ``reset_peak``."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main(Job.from_json(sys.argv[1]))
