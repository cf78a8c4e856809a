"""One autograd.Function over kernel x scheme: how attention runs when a sequence is spread over ranks.

Shapes: R rows, S this rank's tokens, N query heads, M key/value heads, D head_dim.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels.attention import Kernel

Saved = tuple[Tensor, ...]


class Scheme(Protocol):
    """How q, k and v travel between ranks; forward and backward, both written out.

    No scheme lets autograd run through a message or through a merge of partial results. Ulysses sends
    heads one way and gets them back. A ring keeps queries at home: its forward calls the kernel once
    a hop with the mask of that hop (documents cut to the visiting keys, with ``q_offset`` and
    ``k_offset``), merges ``out`` and ``lse`` in float32 and saves its own q, k, v with the *merged*
    out and lse; its backward sends k and v round again, calls ``Kernel.backward`` with the merged lse
    and lets dk and dv travel on in float32 until they are home. ``Comm.exchange`` is its one verb.
    """

    def forward(
        self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float
    ) -> tuple[Tensor, Saved]:
        """``(out [R, S, N, D], what backward needs)`` for local q ``[R, S, N, D]``, k and v ``[R, S, M, D]``."""
        ...

    def backward(
        self, kernel: Kernel, dout: Tensor, saved: Saved, mask: MaskSpec, softmax_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(dq, dk, dv)`` of this rank's q, k and v."""
        ...


class LocalScheme:
    """One rank holds the whole sequence: nothing travels."""

    def forward(
        self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float
    ) -> tuple[Tensor, Saved]:
        """See Scheme."""
        q_flat, k_flat, v_flat = (x.flatten(0, 1) for x in (q, k, v))
        out, lse = kernel.forward(q_flat, k_flat, v_flat, mask, softmax_scale)
        return out.view(q.shape), (q_flat, k_flat, v_flat, out, lse)

    def backward(
        self, kernel: Kernel, dout: Tensor, saved: Saved, mask: MaskSpec, softmax_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Scheme."""
        q, k, v, out, lse = saved
        dq, dk, dv = kernel.backward(dout.flatten(0, 1), q, k, v, out, lse, mask, softmax_scale)
        rows = dout.shape[:2]
        return dq.unflatten(0, rows), dk.unflatten(0, rows), dv.unflatten(0, rows)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: MaskSpec,
        softmax_scale: float,
        scheme: Scheme,
        kernel: Kernel,
    ) -> Tensor:
        out, saved = scheme.forward(kernel, q, k, v, mask, softmax_scale)
        ctx.save_for_backward(*saved)
        ctx.call = (mask, softmax_scale, scheme, kernel)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dout,) = grad_outputs
        mask, softmax_scale, scheme, kernel = ctx.call
        grads = scheme.backward(kernel, dout, ctx.saved_tensors, mask, softmax_scale)
        return (*grads, None, None, None, None)


class ParallelSequenceOps:
    """SequenceOps of one rank: a kernel, and the scheme by which its group shares the sequence."""

    def __init__(self, kernel: Kernel, scheme: Scheme) -> None:
        self.kernel = kernel
        self.scheme = scheme

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float) -> Tensor:
        """See SequenceOps."""
        return _Attend.apply(q, k, v, mask, softmax_scale, self.scheme, self.kernel)
