"""RMSNorm whose backward keeps its input and one number a token.

PyTorch's CPU RMSNorm is a chain of elementwise operations: autograd keeps four tensors of its input's size, two
of them float32. CUDA has a fused one, which keeps what this keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Numbers in work at a time: a float32 copy of half a MiB stays in a core's cache.
CHUNK_NUMBERS = 2**17


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` with a smaller memory on the CPU (arXiv 1910.07467); same parameters, same result."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to the same shape and dtype; computed in float32 (float64 for float64)."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        assert self.eps is not None
        return _RmsNorm.apply(x, self.weight, self.eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        work = torch.promote_types(x.dtype, torch.float32)
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        inverse_rms = rows.new_empty(len(rows), 1, dtype=work)
        for part, out_part, inverse in _chunks(rows, out, inverse_rms):
            values = part.to(work)
            torch.rsqrt(values.square().mean(-1, keepdim=True) + eps, out=inverse)
            # Rounded before the weight is applied, as PyTorch and Llama do.
            torch.mul((values * inverse).to(x.dtype), weight, out=out_part)
        ctx.save_for_backward(x, weight, inverse_rms)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        rows, grads = x.reshape(-1, x.shape[-1]), grad_outputs[0].reshape(-1, x.shape[-1])
        work = inverse_rms.dtype
        dx = torch.empty_like(rows, memory_format=torch.contiguous_format)
        d_weight = torch.zeros_like(weight, dtype=work)
        for part, grad, dx_part, inverse in _chunks(rows, grads, dx, inverse_rms):
            unit = part.to(work) * inverse
            scaled = grad.to(work)
            d_weight += (scaled * unit).sum(0)
            scaled = scaled * weight
            # x / rms has a Jacobian that takes out the component along x itself.
            unit *= (scaled * unit).mean(-1, keepdim=True)
            dx_part.copy_(scaled.sub_(unit).mul_(inverse))
        return dx.view(x.shape), d_weight.to(weight.dtype), None


def _chunks(*tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    rows = max(1, CHUNK_NUMBERS // tensors[0].shape[1])
    return zip(*(x.split(rows) for x in tensors))
