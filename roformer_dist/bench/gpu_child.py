"""One sample of ``bench gpu``: measure in this process and print a line of JSON."""

from __future__ import annotations

import json
import sys
import time
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
from roformer_dist.kernels.attention import Kernel, choose_kernel
from roformer_dist.kernels.selfcheck import kernel_errors
from roformer_dist.kernels.varlen import FlashAttn2, TorchFlash, VarlenKernel
from roformer_dist.model.options import apply_options
from roformer_dist.model.roformer import build_model
from roformer_dist.model.rotary import Rotary
from roformer_dist.objectives import SummedLoss
from roformer_dist.parallel.sequence_ops import single_sequence_ops

HEAD_DIMS = (32, 64, 96, 128, 192, 256)
# A step of a longer row takes minutes, beside which what a first run costs is little.
ONCE_ABOVE = 131072


def main(job: GpuJob) -> None:
    """Run ``job``; every figure is of one causal document as long as the row."""
    device = torch.device(job.device)
    rate = matmul_rate(device)
    tokens, said = job.tokens, {}
    if job.task == "longest":
        tokens, seconds, said["bound"] = longest(job, device)
    elif job.task == "spread":
        seconds, said = spread(job, device)
    elif job.task == "numerics":
        said["numerics"] = numerics(job, device)
        seconds = attention_seconds(job, device, unchecked_kernel(job.contender, device), rotated=False)
    elif job.task == "attention":
        seconds = attention_seconds(job, device, choose_kernel(job.contender, device, DTYPE)[0])
    else:
        attention = attention_seconds(job, device, choose_kernel("auto", device, DTYPE)[0], rotated=False)
        _forget_peak(device)
        seconds = median_seconds(step_work(job, device)(tokens), job.steps, device, job.warmups)
        said = ceiling(job, seconds, rate, attention)
    print(json.dumps({**figures(job, tokens, seconds, rate, _peak(device)), **said}))


def figures(job: GpuJob, tokens: int, seconds: float, rate: float, peak: int) -> dict[str, Any]:
    """What a sample reports."""
    if job.task in ("numerics", "attention", "spread"):
        full = attention_flops(job.model, tokens)
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


def attention_flops(model: GpuModel, tokens: int) -> float:
    """Forward and backward of one layer's attention in the full convention."""
    return 12 * tokens * tokens * model.num_heads * model.head_dim


def ceiling(job: GpuJob, seconds: float, rate: float, attention: float) -> dict[str, float]:
    """How near the step comes to its matrix products and attention alone, each at its measured rate, nothing twice.

    Args:
        rate: of matrix products, operations a second.
        attention: seconds of the kernel, forward and backward, in one layer.
    """
    model = job.model
    least = 6 * model.matrix_weights * job.tokens / rate + model.num_layers * attention
    return {
        "ceiling_seconds": least,
        "of_ceiling": least / seconds,
        "kernel_tera_flops": attention_flops(model, job.tokens) / 2 / attention / 1e12,
    }


def unchecked_kernel(name: str, device: torch.device) -> Kernel:
    """The kernel called ``name``, whatever its check says, so that its errors can be shown."""
    if device.type == "cpu":
        return choose_kernel(name, device)[0]
    return VarlenKernel({"varlen": TorchFlash, "flash_attn": FlashAttn2}[name]())


def numerics(job: GpuJob, device: torch.device) -> dict[str, dict[int, dict[str, float]]]:
    """Errors of out, lse and each gradient against float64, by dtype and head_dim."""
    kernel = unchecked_kernel(job.contender, device)
    dtypes = (torch.bfloat16, torch.float16 if device.type == "cuda" else torch.float32)
    return {
        str(dtype).removeprefix("torch."): {
            head_dim: kernel_errors(kernel, device, dtype, head_dim) for head_dim in HEAD_DIMS
        }
        for dtype in dtypes
    }


def attention_seconds(job: GpuJob, device: torch.device, kernel: Kernel, *, rotated: bool = True) -> float:
    """Attention and the gradients of q, k and v; with the rotation of queries and keys, or without."""
    model = job.model
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
        turned = (phases.rotate(q), phases.rotate(k)) if rotated else (q, k)
        out = ops.attend(*turned, v, mask, model.head_dim**-0.5)
        return torch.autograd.grad(out, leaves, dout)

    return median_seconds(work, job.steps, device, job.warmups)


def step_work(job: GpuJob, device: torch.device) -> Callable[[int], Callable[[], Any]]:
    """For a number of tokens, forward and backward of the decoder; gradients are freed before each."""
    return _ours(job, device) if job.contender == "ours" else _llama(job, device)


def longest(job: GpuJob, device: torch.device) -> tuple[int, float, str]:
    """The longest row that trains, to a sixteenth, its seconds, and what ends it, ``memory`` or ``time``.

    Doubling, then bisection. Each row that trains is printed as it comes.
    """
    started = time.monotonic()
    work_for = step_work(job, device)

    def attempt(tokens: int) -> float | None:
        _forget_peak(device)
        try:
            seconds = median_seconds(work_for(tokens), 1, device, _warmups(tokens))
        except torch.cuda.OutOfMemoryError:
            return None
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        print(f"{tokens:,} tokens: {seconds:.3g} s, {_peak(device) / 2**30:.1f} GiB", flush=True)
        return seconds

    good, seconds, bad = 0, 0.0, 0
    while not bad or bad - good > good // 16:
        tokens = (good + bad) // 2 if bad else 2 * good or job.tokens
        # Attention decides: a row twice as long takes up to four times as long.
        foreseen = seconds * (tokens / good) ** 2 * (1 + _warmups(tokens)) if good else 0
        if time.monotonic() - started + foreseen > job.limit_s:
            return good, seconds, "time"
        took = attempt(tokens)
        if took is None and not good:
            raise RuntimeError(f"{tokens:,} tokens do not fit; start lower")
        if took is None:
            bad = tokens
        else:
            good, seconds = tokens, took
    return good, seconds, "memory"


def _warmups(tokens: int) -> int:
    return 2 if tokens <= ONCE_ABOVE else 0


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


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
