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
from roformer_dist.kernels.linear import Streams
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


class Form(Protocol):
    """What is computed over whole rows with some of the heads: attention in parts, or with a bias.

    T tokens of a row, U of its keys (T unless one rank has fewer queries than keys), H heads.
    """

    def forward(self, full: Sequence[Tensor], heads: range) -> tuple[Tensor, Saved]:
        """``(out [R, T, H, D], saved)`` of queries ``[R, T, H, D]`` and keys ``[R, U, H, D]``.

        ``heads`` are those of the queries; ``saved`` are the inputs, flattened over rows, then out and lse.
        """
        ...

    def backward(self, dout: Tensor, saved: Saved, heads: range) -> Sequence[Tensor]:
        """Gradients of all inputs in their order and shapes."""
        ...


class TradingScheme(Scheme, Protocol):
    """A scheme that brings all tokens of a head together, so that any form can be computed with it."""

    def trade(
        self, form: Form, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]
    ) -> tuple[Tensor, Saved]:
        """``(out [R, S, N, D], what backward needs)`` of ``form`` over all tokens.

        Args:
            form: computes with a rank's heads.
            queries: one or more tensors ``[R, S, N, D]``.
            keys: tensors ``[R, S, M, D]``, values last.
        """
        ...

    def trade_backward(
        self, form: Form, dout: Tensor, saved: Saved, num_queries: int
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Gradients of ``trade``'s ``queries``, of which there were ``num_queries``, and of its ``keys``."""
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

    def trade(
        self, form: Form, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]
    ) -> tuple[Tensor, Saved]:
        """See TradingScheme."""
        return form.forward((*queries, *keys), range(queries[0].shape[2]))

    def trade_backward(
        self, form: Form, dout: Tensor, saved: Saved, num_queries: int
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """See TradingScheme."""
        grads = form.backward(dout, saved, range(dout.shape[2]))
        return grads[:num_queries], grads[num_queries:]


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
    def forward(ctx: Any, form: PartsForm, scheme: TradingScheme, *inputs: Tensor) -> Tensor:
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


class _AttendBiased(torch.autograd.Function):
    """Each head's bias has its gradient on the rank that attended with it, and zero on the others."""

    @staticmethod
    def forward(ctx: Any, form: BiasedForm, scheme: TradingScheme, values: Tensor, *inputs: Tensor) -> Tensor:
        bias = replace(form.bias, values=values.detach())
        out, saved = scheme.trade(replace(form, bias=bias), inputs[:1], inputs[1:])
        ctx.save_for_backward(values, bias.q_positions, bias.k_positions, *saved)
        # The bias is not kept with the call: what is saved for backward can be offloaded and freed.
        ctx.call = (replace(form, bias=None), bias.function, scheme)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        form, function, scheme = ctx.call
        values, q_positions, k_positions, *saved = ctx.saved_tensors
        dvalues = torch.zeros_like(values) if ctx.needs_input_grad[2] else None
        bias = ScoreBias(values.detach(), function, q_positions, k_positions)
        form = replace(form, bias=bias, dvalues=dvalues)
        (dq,), dkeys = scheme.trade_backward(form, grad_outputs[0], tuple(saved), 1)
        return None, None, dvalues, dq, *dkeys


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
        form = PartsForm(self.kernel, [part.mask for part in parts], softmax_scale)
        return _AttendParts.apply(form, self.scheme, *(p.q for p in parts), *(p.k for p in parts), v)

    def attend_biased(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float, bias: ScoreBias
    ) -> Tensor:
        """See SequenceOps."""
        form = BiasedForm(mask, softmax_scale, self.over_all_tokens(bias))
        return _AttendBiased.apply(form, self.scheme, bias.values, q, k, v)

    def over_all_tokens(self, bias: ScoreBias) -> ScoreBias:
        """``bias`` with the positions of all ranks' tokens, ``[R, S]`` to ``[R, T]``."""
        if self.comm.size == 1:
            return bias
        # Queries and keys are the same tokens.
        positions = self.comm.all_gather(bias.q_positions.contiguous()).transpose(0, 1).flatten(1)
        return replace(bias, q_positions=positions, k_positions=positions)

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
