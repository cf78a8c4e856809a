"""Turning pairs of dimensions by given angles, in float32, with a backward that keeps no activations.

Shapes: R rows, S sequence, H heads, D head_dim.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Pairing = Literal["interleaved", "half"]


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
    # float64 stays float64, so that the tests' reference can run in it.
    work = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos[:, :, None, :].to(work), sin[:, :, None, :].to(work)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    half = cos.shape[-1]
    turning, turned = x[..., : 2 * half], out[..., : 2 * half]
    if pairing == "interleaved":
        first, second = turning[..., 0::2].to(work), turning[..., 1::2].to(work)
        turned[..., 0::2] = first * cos - second * sin
        turned[..., 1::2] = first * sin + second * cos
    else:
        first, second = (part.to(work) for part in turning.chunk(2, dim=-1))
        turned[..., :half] = first * cos - second * sin
        turned[..., half:] = first * sin + second * cos
    out[..., 2 * half :] = x[..., 2 * half :]
    return out
