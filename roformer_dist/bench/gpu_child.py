"""One sample of ``bench gpu``: measure in this process and print a line of JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from roformer_dist.batch import Batch, MaskSpec
from roformer_dist.bench.gpu import GpuJob, GpuModel
from roformer_dist.bench.gpu_spread import spread
from roformer_dist.bench.gpu_timing import DTYPE, median_seconds
from roformer_dist.config.model import ModelConfig
from roformer_dist.config.rope import RopeConfig
from roformer_dist.config.training import TrainConfig
from roformer_dist.kernels.attention import choose_kernel
from roformer_dist.model.options import apply_options
from roformer_dist.model.roformer import build_model
from roformer_dist.model.rotary import Rotary
from roformer_dist.objectives import SummedLoss
from roformer_dist.parallel.sequence_ops import single_sequence_ops


def main(job: GpuJob) -> None:
    """Run ``job``; every figure is of one causal document as long as the row."""
    device = torch.device(job.device)
    rate = matmul_rate(device)
    tokens, said = job.tokens, {}
    if job.task == "longest":
        tokens, seconds = longest(job, device)
    elif job.task == "spread":
        seconds, said = spread(job, device)
    else:
        work = attention_work(job, device) if job.task == "attention" else step_work(job, device)(tokens)
        seconds = median_seconds(work, job.steps, device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    print(json.dumps({**figures(job, tokens, seconds, rate, peak), **said}))


def figures(job: GpuJob, tokens: int, seconds: float, rate: float, peak: int) -> dict[str, Any]:
    """What a sample reports."""
    if job.task in ("attention", "spread"):
        model = job.model
        full = 12 * tokens * tokens * model.num_heads * model.head_dim
        halved = full / 2
    else:
        full, halved = (job.model.step_flops(tokens, causal_halved=c) for c in (False, True))
    return {
        "tokens": tokens,
        "tera_flops": halved / seconds / 1e12,
        "share": halved / seconds / rate,
        "full_share": full / seconds / rate,
        "tokens_per_second": tokens / seconds,
        "peak_gib": peak / 2**30,
        "matmul_tera_flops": rate / 1e12,
        "seconds": seconds,
    }


def matmul_rate(device: torch.device) -> float:
    """Operations per second of a bf16 matrix product, the ceiling of this device in this call."""
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=DTYPE) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, 20, device)


def attention_work(job: GpuJob, device: torch.device) -> Callable[[], Any]:
    """Rotation of queries and keys, attention, and the gradients of q, k and v."""
    model = job.model
    kernel, _ = choose_kernel(job.contender, device, DTYPE)
    ops = single_sequence_ops(kernel)
    shapes = (model.num_heads, model.num_kv_heads, model.num_kv_heads, model.num_heads)
    q, k, v, dout = (
        torch.randn(1, job.tokens, heads, model.head_dim, device=device, dtype=DTYPE) for heads in shapes
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    rotary = Rotary(RopeConfig(pairing="half"), model.head_dim)
    phases = rotary.phases(torch.arange(job.tokens, device=device)[None])
    mask = MaskSpec.from_lengths([job.tokens], causal=True).to(device)

    def work() -> tuple[Tensor, ...]:
        out = ops.attend(phases.rotate(q), phases.rotate(k), v, mask, model.head_dim**-0.5)
        return torch.autograd.grad(out, leaves, dout)

    return work


def step_work(job: GpuJob, device: torch.device) -> Callable[[int], Callable[[], Any]]:
    """For a number of tokens, forward and backward of the decoder; gradients are freed before each."""
    return _ours(job, device) if job.contender == "ours" else _llama(job, device)


def longest(job: GpuJob, device: torch.device) -> tuple[int, float]:
    """The longest row that trains, to a sixteenth, and its seconds: doubling, then bisection."""

    work_for = step_work(job, device)

    def attempt(tokens: int) -> float | None:
        try:
            return median_seconds(work_for(tokens), 1, device)
        except torch.cuda.OutOfMemoryError:
            return None
        finally:
            torch.cuda.empty_cache()

    good, seconds, bad = 0, 0.0, job.tokens
    while (took := attempt(bad)) is not None:
        good, seconds, bad = bad, took, 2 * bad
    if not good:
        raise RuntimeError(f"{job.tokens:,} tokens do not fit; start lower")
    while bad - good > good // 16:
        middle = (good + bad) // 2
        took = attempt(middle)
        if took is None:
            bad = middle
        else:
            good, seconds = middle, took
    return good, seconds


def _ours(job: GpuJob, device: torch.device) -> Callable[[int], Callable[[], Any]]:
    train = TrainConfig(
        seq_len=job.tokens,
        tokens_per_step=job.tokens,
        num_steps=1,
        activation_checkpointing=job.checkpointing,  # pyright: ignore[reportArgumentType]
        activation_offload=job.offload and job.checkpointing != "none",
        mlp_tile_tokens=job.mlp_tile_tokens,
    )
    network = build_model(model_config(job.model), masked=False, seed=0)
    apply_options(network, train, device)
    loss = SummedLoss(network.to(device, DTYPE)).train()
    ops = single_sequence_ops(choose_kernel("auto", device, DTYPE)[0])

    def work_for(tokens: int) -> Callable[[], Any]:
        places = torch.arange(tokens)[None]
        ids = places % job.model.vocab_size
        batch = Batch(ids, ids, places, places, MaskSpec.from_lengths([tokens], causal=True)).to(device)

        def work() -> None:
            loss.zero_grad(set_to_none=True)
            total, targets = loss(batch, ops)
            (total / targets).backward()

        return work

    return work_for


def _llama(job: GpuJob, device: torch.device) -> Callable[[int], Callable[[], Any]]:
    from roformer_dist.bench.peers import build_llama

    model = job.model
    network: Any = build_llama(model, job.tokens)
    network.to(device=device, dtype=DTYPE).train()
    if job.checkpointing != "none":
        network.gradient_checkpointing_enable({"use_reentrant": False})

    def work_for(tokens: int) -> Callable[[], Any]:
        ids = (torch.arange(tokens, device=device) % model.vocab_size)[None]

        def work() -> None:
            network.zero_grad(set_to_none=True)
            network(input_ids=ids, labels=ids).loss.backward()

        return work

    return work_for


def model_config(model: GpuModel) -> ModelConfig:
    """Our decoder of that size."""
    return ModelConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        intermediate_size=model.intermediate_size,
        tie_embeddings=False,
        rope=RopeConfig(pairing="half"),
    )


if __name__ == "__main__":
    main(GpuJob.from_json(sys.argv[1]))
