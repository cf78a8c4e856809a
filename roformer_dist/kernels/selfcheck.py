"""A kernel proves its numerics on this machine before it is used: a small ragged case against float64.

A CUDA kernel depends on a driver, a build and a device that nobody tested together. Its forward can be right and
its gradients wrong, silently; this costs less than a second at the start of a run.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels.attention import COMMON_HEADS, HeadShape, Kernel
from roformer_dist.kernels.reference import ReferenceKernel
from roformer_dist.kernels.rotation import Pairing, rotate

# Relative to the largest number of a tensor, or to 1 where it is smaller: probabilities, outputs and gradients are
# each rounded by 2^-9.
BOUND = 2**-6
SCALE = 0.1


def check_kernel(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: HeadShape = COMMON_HEADS
) -> str | None:
    """What is wrong with ``kernel``, in words; None when forward and every gradient are within ``BOUND``.

    Of ``heads``, two key/value heads are enough; a kernel is made for a width and a grouping.
    """
    few = min(heads.kv_heads, 2)
    heads = HeadShape(few * (heads.num_heads // heads.kv_heads), few, heads.head_dim)
    try:
        for name, mask in _masks().items():
            for tensor, error in _errors(kernel, mask, device, dtype, heads).items():
                if not error <= BOUND:
                    return (
                        f"{tensor} of {name}, {heads}, is off by {error:.2g} of its largest value, and {BOUND:.2g} is "
                        "allowed"
                    )
    except (RuntimeError, ImportError, TypeError, AttributeError) as error:
        return " ".join(str(error).split())[:200]
    return None


def kernel_errors(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int
) -> dict[str, float]:
    """The largest error of out, lse, dq, dk and dv over the cases of ``check_kernel``, as shares of what it bounds."""
    errors = [
        _errors(kernel, mask, device, dtype, HeadShape(head_dim=head_dim)) for mask in _masks().values()
    ]
    return {name: max(case[name] for case in errors) for name in errors[0]}


def check_rotation(device: torch.device, dtype: torch.dtype) -> str | None:
    """The same for the rotation in use on ``device``."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(2, 37, 3, 64, generator=generator).to(dtype) for _ in range(2))
    angles = torch.rand(2, 37, 24, generator=generator) * 100  # 48 of the 64 dimensions turn
    pairings: tuple[Pairing, ...] = ("interleaved", "half")
    try:
        for pairing in pairings:
            found = _rotated(x.to(device), grad.to(device), angles.to(device), pairing)
            wanted = _rotated(x.double(), grad.double(), angles, pairing)
            error = max(_distance(a, b) for a, b in zip(found, wanted))
            if not error <= BOUND:
                return f"pairing {pairing} is off by {error:.2g}"
    except (RuntimeError, ImportError, TypeError, AttributeError, AssertionError) as error:
        return " ".join(str(error).split())[:200]
    return None


def _masks() -> dict[str, MaskSpec]:
    documents = [1, 70, 129, 3, 1]
    return {
        "causal documents": MaskSpec.from_lengths(documents, causal=True),
        "documents seen both ways": MaskSpec.from_lengths(documents, causal=False),
        "a causal window": MaskSpec.from_lengths(documents, causal=True, window=17),
        "one-token documents": MaskSpec.from_lengths([1] * 5, causal=True),
        # Queries in the middle of, before and past their keys; some see none.
        "offsets": _with_offsets([33, 20, 40], [65, 20, 40], [20, 0, 50], [0, 12, 0], window=None),
        "offsets and a window": _with_offsets([33, 20, 40], [65, 20, 40], [20, 0, 50], [0, 12, 0], window=30),
    }


def _with_offsets(
    q_lens: list[int], k_lens: list[int], q_offsets: list[int], k_offsets: list[int], window: int | None
) -> MaskSpec:
    def int32(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    sums_q, sums_k = (int32(list(accumulate(lengths, initial=0))) for lengths in (q_lens, k_lens))
    offsets = int32(q_offsets), int32(k_offsets)
    return MaskSpec(sums_q, sums_k, max(q_lens), max(k_lens), True, *offsets, window=window)


def _errors(
    kernel: Kernel, mask: MaskSpec, device: torch.device, dtype: torch.dtype, heads: HeadShape
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    tokens_q, tokens_k = int(mask.cu_seqlens_q[-1]), int(mask.cu_seqlens_k[-1])
    shapes = [(tokens_q, heads.num_heads), *[(tokens_k, heads.kv_heads)] * 2, (tokens_q, heads.num_heads)]
    q, k, v, dout = (torch.randn(*shape, heads.head_dim, generator=generator).to(dtype) for shape in shapes)
    found = _run(kernel, [x.to(device) for x in (q, k, v, dout)], mask.to(device))
    wanted = _run(ReferenceKernel(), [x.double() for x in (q, k, v, dout)], mask)
    blind = wanted["lse"] == -torch.inf
    if not torch.equal(found["lse"].cpu() == -torch.inf, blind):
        return dict.fromkeys(wanted, torch.inf)
    found["lse"], wanted["lse"] = found["lse"].cpu()[~blind], wanted["lse"][~blind]
    return {name: _distance(found[name], want) for name, want in wanted.items()}


def _run(kernel: Kernel, tensors: list[Tensor], mask: MaskSpec) -> dict[str, Tensor]:
    q, k, v, dout = tensors
    out, lse = kernel.forward(q, k, v, mask, SCALE)
    dq, dk, dv = kernel.backward(dout, q, k, v, out, lse, mask, SCALE)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def _rotated(x: Tensor, grad: Tensor, angles: Tensor, pairing: Pairing) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    out = rotate(leaf, angles.cos(), angles.sin(), pairing)
    out.backward(grad)
    assert leaf.grad is not None
    return out.detach(), leaf.grad


def _distance(found: Tensor, wanted: Tensor) -> float:
    if wanted.numel() == 0:
        return 0.0
    error = (found.detach().double().cpu() - wanted).abs().max()
    return float(error / wanted.abs().max().clamp(min=1.0))
