"""Turning pairs of dimensions by given angles, in float32, with a backward that keeps no activations.

Shapes: R rows, S sequence, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

Pairing = Literal["interleaved", "half"]

# On the CPU, so many tokens at a time: their float32 copies stay in cache. One core, 4,096 tokens, 8 heads of 64:
# 1.4 ms bf16 and 0.8 ms fp32 interleaved (the pairs as complex numbers; strided halves: 7.9 ms), 1.6 and 2.4 ms half.
CHUNK_TOKENS = 256


def rotate(x_RSHD: Tensor, cos_RSF: Tensor, sin_RSF: Tensor, pairing: Pairing) -> Tensor:
    """Rotate each pair of ``x`` by its angle (RoFormer, eq. 34); computed in float32, returned in x's dtype.

    Args:
        x_RSHD: ``[R, S, H, D]``.
        cos_RSF, sin_RSF: float32 ``[R, S, F]``, broadcast over heads; the first 2 F of D dimensions turn.
        pairing: ``interleaved`` turns (2i, 2i+1), ``half`` turns (i, i + F).
    """
    return _Rotate.apply(x_RSHD, cos_RSF, sin_RSF, pairing)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back, so only cos and sin are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, pairing: Pairing) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.pairing = pairing
        return _turn(x, cos, sin, pairing)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grad_outputs
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, ctx.pairing), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, pairing: Pairing) -> Tensor:
    if x.is_cuda and x.dtype != torch.float64 and (fused := _fused_rotary()) is not None:
        # One row as long as all, so that the kernel's "position in the sequence" is the token; float32 inside.
        flat_cos, flat_sin = cos.flatten(0, 1), sin.flatten(0, 1)
        flat = x.flatten(0, 1)[None]
        return fused(flat, flat_cos, flat_sin, interleaved=pairing == "interleaved").view(x.shape)
    # float64 stays float64, so that the tests' reference can run in it.
    work = torch.promote_types(x.dtype, torch.float32)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    turned = 2 * cos.shape[-1]
    size = CHUNK_TOKENS if x.device.type == "cpu" else max(1, x.shape[1])
    for x_part, out_part, cos_part, sin_part in zip(*(t.split(size, dim=1) for t in (x, out, cos, sin))):
        out_part[..., turned:] = x_part[..., turned:]
        part, target = x_part[..., :turned].to(work), out_part[..., :turned]
        c, s = cos_part[:, :, None].to(work), sin_part[:, :, None].to(work)
        if pairing == "interleaved":
            pairs = torch.view_as_complex(part.contiguous().unflatten(-1, (-1, 2)))
            target.copy_(torch.view_as_real(pairs * torch.complex(c, s)).flatten(-2))
        else:
            (first, second), (target_first, target_second) = part.chunk(2, dim=-1), target.chunk(2, dim=-1)
            target_first.copy_((first * c).addcmul_(second, s, value=-1))
            target_second.copy_((second * c).addcmul_(first, s))
    return out


@cache
def _fused_rotary() -> Callable[..., Tensor] | None:
    """flash-attn's Triton kernel where it is installed; it keeps dimensions beyond those that turn."""
    try:
        from flash_attn.ops.triton.rotary import apply_rotary  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return apply_rotary
