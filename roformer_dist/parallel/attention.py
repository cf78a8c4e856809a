"""One autograd.Function over kernel x scheme: how attention runs when a sequence is spread over ranks.

Shapes: R rows, S this rank's tokens, N query heads, M key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels.attention import Kernel, ScoreBias, ScorePart
from roformer_dist.kernels.biased import biased_backward, biased_forward
from roformer_dist.kernels.linear import Streams
from roformer_dist.kernels.parts import parts_backward, parts_forward
from roformer_dist.parallel.comm import Comm, SoloComm
from roformer_dist.parallel.forms import BiasedForm, PartsForm
from roformer_dist.parallel.layout import ContiguousLayout, Layout
from roformer_dist.parallel.states import SharedStates

# Of a scheme inside Ulysses: its flattened q, k, v, out and lse, in this order.
Saved = tuple[Tensor, ...]


class Scheme(Protocol):
    """How q, k and v travel between ranks; forward and backward, both written out.

    No scheme lets autograd run through a message or through a merge of partial results. Ulysses sends
    heads one way and gets them back. A ring keeps queries at home: its forward calls the kernel once
    a hop with the mask of that hop, merges ``out`` and ``lse`` in float32 and saves its own q, k, v with
    the *merged* out and lse; its backward has the same keys come again, calls ``Kernel.backward`` with
    the merged lse and sends dk and dv home in float32.
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


class _AttendParts(torch.autograd.Function):
    """Own backward: autograd through the merge of the parts would give wrong gradients."""

    @staticmethod
    def forward(
        ctx: Any, masks: list[MaskSpec], softmax_scale: float, kernel: Kernel, v: Tensor, *pairs: Tensor
    ) -> Tensor:
        flat_v, *flat_pairs = (x.flatten(0, 1) for x in (v, *pairs))
        parts = list(zip(flat_pairs[0::2], flat_pairs[1::2], masks))
        out, lse = parts_forward(kernel, parts, flat_v, softmax_scale)
        ctx.save_for_backward(out, lse, flat_v, *flat_pairs)
        ctx.call = (masks, softmax_scale, kernel, pairs[0].shape[:2], v.shape[:2])
        return out.unflatten(0, pairs[0].shape[:2])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dout,) = grad_outputs
        masks, softmax_scale, kernel, q_rows, k_rows = ctx.call
        out, lse, v, *pairs = ctx.saved_tensors
        parts = list(zip(pairs[0::2], pairs[1::2], masks))
        d_pairs, dv = parts_backward(kernel, dout.flatten(0, 1), parts, v, out, lse, softmax_scale)
        grads = (x for dq, dk in d_pairs for x in (dq.unflatten(0, q_rows), dk.unflatten(0, k_rows)))
        return None, None, None, dv.unflatten(0, k_rows), *grads


class _AttendBiased(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        values: Tensor,
        mask: MaskSpec,
        softmax_scale: float,
        bias: ScoreBias,
    ) -> Tensor:
        flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
        positions = bias.q_positions.flatten(), bias.k_positions.flatten()
        # Not kept with the call: what is saved for backward can be offloaded and freed.
        bias = ScoreBias(values.detach(), bias.function, *positions)
        out, lse = biased_forward(flat_q, flat_k, flat_v, mask, softmax_scale, bias)
        ctx.save_for_backward(flat_q, flat_k, flat_v, out, lse, values, *positions)
        ctx.call = (mask, softmax_scale, bias.function, q.shape[:2], k.shape[:2])
        return out.unflatten(0, q.shape[:2])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dout,) = grad_outputs
        mask, softmax_scale, function, q_rows, k_rows = ctx.call
        q, k, v, out, lse, values, *positions = ctx.saved_tensors
        bias = ScoreBias(values.detach().requires_grad_(ctx.needs_input_grad[3]), function, *positions)
        flat_dout = dout.flatten(0, 1)
        dq, dk, dv, dvalues = biased_backward(flat_dout, q, k, v, out, lse, mask, softmax_scale, bias)
        grads = dq.unflatten(0, q_rows), dk.unflatten(0, k_rows), dv.unflatten(0, k_rows)
        return *grads, dvalues, None, None, None


class _LinearAttend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mask: MaskSpec, shared: SharedStates, *streams: Tensor) -> Tensor:
        flat = Streams(*(x.flatten(0, 1) for x in streams))
        rows = streams[0].shape[:2]
        out, denominator, before = shared.forward(flat, mask, rows[0])
        ctx.save_for_backward(*flat, out, denominator, before)
        ctx.call = (mask, shared, rows)
        return out.unflatten(0, rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dout,) = grad_outputs
        mask, shared, rows = ctx.call
        *streams, out, denominator, before = ctx.saved_tensors
        grads = shared.backward(
            dout.flatten(0, 1), Streams(*streams), out, denominator, before, mask, rows[0]
        )
        return None, None, *(grad.unflatten(0, rows) for grad in grads)


class _TradeParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: PartsForm, scheme: Any, *inputs: Tensor) -> Tensor:
        count = len(form.masks)
        out, saved = scheme.trade(form, inputs[:count], inputs[count:])
        ctx.save_for_backward(*saved)
        ctx.call = (form, scheme, count)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        form, scheme, count = ctx.call
        dqueries, dkeys = scheme.trade_backward(form, grad_outputs[0], ctx.saved_tensors, count)
        return None, None, *dqueries, *dkeys


class _TradeBiased(torch.autograd.Function):
    """Each head's bias has its gradient on the rank that attended with it, and zero on the others."""

    @staticmethod
    def forward(ctx: Any, form: BiasedForm, scheme: Any, values: Tensor, *inputs: Tensor) -> Tensor:
        bias = form.bias
        positions = _all_positions(scheme.comm, bias.q_positions)
        form = replace(form, bias=ScoreBias(values.detach(), bias.function, positions, positions))
        out, saved = scheme.trade(form, inputs[:1], inputs[1:])
        ctx.save_for_backward(values, positions, *saved)
        ctx.call = (replace(form, bias=None), bias.function, scheme)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        form, function, scheme = ctx.call
        values, positions, *saved = ctx.saved_tensors
        dvalues = torch.zeros_like(values) if ctx.needs_input_grad[2] else None
        bias = ScoreBias(values.detach(), function, positions, positions)
        form = replace(form, bias=bias, dvalues=dvalues)
        (dq,), dkeys = scheme.trade_backward(form, grad_outputs[0], tuple(saved), 1)
        return None, None, dvalues, dq, *dkeys


def _all_positions(comm: Comm, positions: Tensor) -> Tensor:
    """``[R, S]`` of every rank as ``[R, T]``."""
    return comm.all_gather(positions.contiguous()).transpose(0, 1).flatten(1)


class _SumOverRanks(torch.autograd.Function):
    """Every rank gets the sum and makes a part of the loss from it: the gradients of all are summed too."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, comm: Comm) -> Tensor:
        ctx.comm = comm
        return comm.all_sum(part)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dsum,) = grad_outputs
        return ctx.comm.all_sum(dsum), None


class ParallelSequenceOps:
    """SequenceOps of one rank.

    Args:
        kernel: what attends.
        scheme: how softmax attention runs over the ranks of a sequence.
        comm: all of these ranks.
        layout: how a sequence's tokens are spread over them.
    """

    def __init__(
        self, kernel: Kernel, scheme: Scheme, comm: Comm | None = None, layout: Layout | None = None
    ) -> None:
        self.kernel = kernel
        self.scheme = scheme
        self.comm = comm or SoloComm()
        self._states = SharedStates(self.comm, layout or ContiguousLayout(self.comm.size))

    @property
    def share(self) -> float:
        """See SequenceOps."""
        return 1 / self.comm.size

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float) -> Tensor:
        """See SequenceOps."""
        return _Attend.apply(q, k, v, mask, softmax_scale, self.scheme, self.kernel)

    def attend_parts(self, parts: Sequence[ScorePart], v: Tensor, softmax_scale: float) -> Tensor:
        """See SequenceOps."""
        if not isinstance(self.scheme, LocalScheme):
            form = PartsForm(self.kernel, [part.mask for part in parts], softmax_scale)
            inputs = [part.q for part in parts] + [part.k for part in parts] + [v]
            return _TradeParts.apply(form, self.scheme, *inputs)
        pairs = [x for part in parts for x in (part.q, part.k)]
        return _AttendParts.apply([part.mask for part in parts], softmax_scale, self.kernel, v, *pairs)

    def attend_biased(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float, bias: ScoreBias
    ) -> Tensor:
        """See SequenceOps."""
        if not isinstance(self.scheme, LocalScheme):
            form = BiasedForm(mask, softmax_scale, bias)
            return _TradeBiased.apply(form, self.scheme, bias.values, q, k, v)
        return _AttendBiased.apply(q, k, v, bias.values, mask, softmax_scale, bias)

    def linear_attend(
        self, q_rotated: Tensor, k_rotated: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec
    ) -> Tensor:
        """See SequenceOps."""
        return _LinearAttend.apply(mask, self._states, q_rotated, k_rotated, q, k, v)

    def pool(self, x: Tensor, weights: Tensor) -> Tensor:
        """See SequenceOps."""
        part = torch.einsum("rsc,rs->rc", x, weights.to(x.dtype))
        if self.comm.size == 1:
            return part
        # In float32 between the ranks, forward and (by the cast's own backward) backward.
        return _SumOverRanks.apply(part.to(torch.promote_types(x.dtype, torch.float32)), self.comm).to(
            x.dtype
        )
