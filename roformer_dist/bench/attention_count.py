"""Counting attention's cost without computing it: messages at Comm and buffers alive, on in-process ranks."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from roformer_dist.batch import Batch, MaskSpec
from roformer_dist.kernels.attention import ScoreBias
from roformer_dist.parallel.attention import ParallelSequenceOps, Saved, TradingScheme
from roformer_dist.parallel.comm import Comm, Pending
from roformer_dist.parallel.counting import CountingComm
from roformer_dist.parallel.in_process import run_in_process
from roformer_dist.parallel.mesh import build_mesh
from roformer_dist.parallel.sequence_ops import sequence_ops


@dataclass(frozen=True)
class Case:
    """One scheme on one row.

    Attributes:
        ulysses_size, ring_size, head_chunks: the scheme.
        heads, kv_heads, head_dim: of the model.
        lengths: documents of the row.
        causal, window: the mask.
        dtype: of q, k and v.
        form: "plain"; "biased", which needs all positions; "parts", two queries and keys of each token.
    """

    ulysses_size: int
    ring_size: int
    head_chunks: int
    heads: int
    kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    causal: bool = True
    window: int | None = None
    dtype: torch.dtype = torch.bfloat16
    form: str = "plain"

    @property
    def parts(self) -> int:
        """How many queries and keys a token has."""
        return 2 if self.form == "parts" else 1


@dataclass(frozen=True)
class Counted:
    """One rank's figures for one layer.

    Attributes:
        forward_sent, backward_sent: bytes that left the rank.
        forward_messages, backward_messages: in how many messages.
        forward_peak, backward_peak: most bytes alive at once beyond the rank's own q, k, v (and dout).
        local_bytes: the rank's own q, k and v.
    """

    forward_sent: int
    backward_sent: int
    forward_messages: int
    backward_messages: int
    forward_peak: int
    backward_peak: int
    local_bytes: int


class BufferCount(TorchDispatchMode):
    """The bytes of the storages that operations make while it is on: alive now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.counts = True
        self._seen: set[int] = set()

    def ignore(self, *tensors: Tensor) -> None:
        """Count these storages for nothing."""
        self._seen |= {x.untyped_storage()._cdata for x in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note the storages it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if self.counts and isinstance(leaf, Tensor):
                self.note(leaf)
        return result

    def note(self, tensor: Tensor) -> None:
        """Count the storage of ``tensor`` while it lives, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        # Index tensors of a plan are made once a micro-batch, not once a layer.
        if key in self._seen or not tensor.is_floating_point():
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


class HeldMessages(CountingComm):
    """Counts a message as a process holds it: what is sent and what comes, from the call until it is waited for.

    Ranks of one process hand over copies instead, whose lives depend on which of them is faster.
    """

    buffers: BufferCount | None = None

    def exchange(
        self, tensor: Tensor, *, to: int, source: int, shape: Sequence[int] | None = None
    ) -> Pending:
        """See Comm."""
        buffers = self.buffers
        if buffers is None:
            return super().exchange(tensor, to=to, source=source, shape=shape)
        place = tensor.new_empty(tensor.shape if shape is None else shape)
        buffers.counts = False
        under_way = super().exchange(tensor, to=to, source=source, shape=shape)
        buffers.counts = True
        return _Held(under_way, tensor, place)


@dataclass(frozen=True)
class _Held:
    under_way: Pending
    sent: Tensor
    place: Tensor

    def wait(self) -> Tensor:
        """See Pending."""
        self.place.copy_(self.under_way.wait())
        return self.place


class NoKernel:
    """The shapes of attention without the arithmetic."""

    name = "none"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        return torch.zeros_like(q), q.new_zeros((q.shape[1], q.shape[0]), dtype=dtype)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: MaskSpec,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernel."""
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


class NoForm:
    """The shapes of attention in parts or with a bias, without the arithmetic."""

    def forward(self, full: Sequence[Tensor], heads: range) -> tuple[Tensor, Saved]:
        """See Form."""
        del heads
        flat = [x.flatten(0, 1) for x in full]
        dtype = torch.promote_types(flat[0].dtype, torch.float32)
        lse = flat[0].new_zeros((flat[0].shape[1], flat[0].shape[0]), dtype=dtype)
        out = torch.zeros_like(flat[0])
        return out.view(full[0].shape), (*flat, out, lse)

    def backward(self, dout: Tensor, saved: Saved, heads: range) -> Sequence[Tensor]:
        """See Form."""
        del heads
        return [torch.zeros_like(x).unflatten(0, (dout.shape[0], -1)) for x in saved[:-2]]


def _forward(
    case: Case, ops: ParallelSequenceOps, part: Batch, inputs: Sequence[Tensor]
) -> tuple[Tensor, Saved]:
    q, k, v = inputs
    if case.form == "plain":
        return ops.scheme.forward(ops.kernel, q, k, v, part.mask, 1.0)
    if case.form == "biased":
        ops.over_all_tokens(ScoreBias(q, lambda values, _: values, part.position_ids, part.position_ids))
    return cast(TradingScheme, ops.scheme).trade(NoForm(), (q,) * case.parts, (*(k,) * case.parts, v))


def _backward(
    case: Case, ops: ParallelSequenceOps, part: Batch, dout: Tensor, saved: Saved
) -> tuple[Sequence[Tensor], ...]:
    if case.form == "plain":
        return (ops.scheme.backward(ops.kernel, dout, saved, part.mask, 1.0),)
    return cast(TradingScheme, ops.scheme).trade_backward(NoForm(), dout, saved, case.parts)


def count(case: Case) -> list[Counted]:
    """What each rank sends and holds, forward and backward, in the order of ``sp_rank``."""
    tokens = sum(case.lengths)
    filler = torch.zeros((1, tokens), dtype=torch.int64)
    mask = MaskSpec.from_lengths(list(case.lengths), causal=case.causal, window=case.window)
    batch = Batch(filler, filler, filler, filler, mask)

    def rank(comm: Comm) -> Counted:
        counting = HeldMessages(comm)
        mesh = build_mesh(counting, ulysses_size=case.ulysses_size, ring_size=case.ring_size)
        ops, layout = sequence_ops(NoKernel(), mesh, case.head_chunks)
        part = layout.slice(batch, comm.rank)
        local = part.input_ids.shape[1]
        q, k, v, dout = (
            torch.zeros((1, local, heads, case.head_dim), dtype=case.dtype)
            for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
        )
        messages = counting.messages
        messages.clear()
        with BufferCount() as buffers:
            buffers.ignore(q, k, v, dout)
            ring = mesh.ring
            assert isinstance(ring, HeldMessages)
            ring.buffers = buffers
            out, saved = _forward(case, ops, part, (q, k, v))
            forward_peak, number = buffers.peak, len(messages)
            buffers.peak = buffers.alive
            grads = _backward(case, ops, part, dout, saved)
            backward_peak = buffers.peak
            del out, saved, grads
        return Counted(
            sum(message.sent for message in messages[:number]),
            sum(message.sent for message in messages[number:]),
            sum(message.sent > 0 for message in messages[:number]),
            sum(message.sent > 0 for message in messages[number:]),
            forward_peak,
            backward_peak,
            sum(x.numel() * x.element_size() for x in (q, k, v)),
        )

    return run_in_process(case.ulysses_size * case.ring_size, rank)
