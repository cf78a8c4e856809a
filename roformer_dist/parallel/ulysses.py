"""Ulysses: trade a slice of the sequence for a slice of the heads, attend, and trade back.

Source: Jacobs et al., arXiv 2309.14509; in chunks of heads as in arXiv 2602.21196. What happens between
the two trades is another scheme's: the kernel alone, or a ring of such groups (USP, arXiv 2405.07719).

Shapes: R rows, S this rank's tokens, T = P * S those of the group, N query heads, M key/value heads,
H heads of a rank, D head_dim, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels.attention import Kernel
from roformer_dist.parallel.attention import Form, LocalScheme, Saved, Scheme
from roformer_dist.parallel.comm import Comm
from roformer_dist.parallel.heads import HeadShare, spread_heads

Round = list[HeadShare]


@dataclass(frozen=True)
class _Inner:
    """Softmax attention by another scheme."""

    scheme: Scheme
    kernel: Kernel
    mask: MaskSpec
    softmax_scale: float

    def forward(self, full: Sequence[Tensor], heads: range) -> tuple[Tensor, Saved]:
        q, k, v = full
        return self.scheme.forward(self.kernel, q, k, v, self.mask, self.softmax_scale)

    def backward(self, dout: Tensor, saved: Saved, heads: range) -> Sequence[Tensor]:
        return self.scheme.backward(self.kernel, dout, saved, self.mask, self.softmax_scale)


class UlyssesScheme:
    """All-to-all between sequence and heads.

    The mask is that of the whole micro-batch, the same on every rank. Each tensor is a message of its own, so
    that what arrives lies side by side and what returns needs no packing. With ``head_chunks`` the heads go
    through in that many rounds: a round's buffers are a fraction of all, what is kept for the
    backward is local, and the backward sends it again.

    Args:
        comm: the ranks that trade.
        inner: what attends with a rank's heads.
        head_chunks: rounds.
    """

    def __init__(self, comm: Comm, inner: Scheme | None = None, head_chunks: int = 1) -> None:
        self.comm = comm
        self.inner = inner or LocalScheme()
        self.head_chunks = head_chunks

    def forward(
        self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float
    ) -> tuple[Tensor, Saved]:
        """See Scheme."""
        return self.trade(_Inner(self.inner, kernel, mask, softmax_scale), (q,), (k, v))

    def backward(
        self, kernel: Kernel, dout: Tensor, saved: Saved, mask: MaskSpec, softmax_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Scheme."""
        form = _Inner(self.inner, kernel, mask, softmax_scale)
        (dq,), (dk, dv) = self.trade_backward(form, dout, saved, 1)
        return dq, dk, dv

    def trade(
        self, form: Form, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]
    ) -> tuple[Tensor, Saved]:
        """See TradingScheme."""
        rounds = self._rounds(queries[0], keys[0])
        out = torch.empty_like(queries[0], memory_format=torch.contiguous_format)
        kept: list[Tensor] = []
        for shares in rounds:
            full = self._all_to_heads(shares, queries, keys)
            out_full, saved = form.forward(full, shares[self.comm.rank].queries)
            del full
            self._to_sequence([share.queries for share in shares], out_full, out)
            del out_full
            kept += saved if len(rounds) == 1 else saved[-1:]
            del saved
        if len(rounds) == 1:
            # Its shape says how many key/value heads there are.
            return out, (*kept, keys[0].new_empty((0, *keys[0].shape[1:])))
        return out, (*kept, *queries, *keys, out)

    def trade_backward(
        self, form: Form, dout: Tensor, saved: Saved, num_queries: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See TradingScheme."""
        chunked = self.head_chunks > 1
        kept = saved[: self.head_chunks] if chunked else saved[:-1]
        inputs = saved[self.head_chunks : -1] if chunked else saved[:-3]
        k = inputs[-1] if chunked else saved[-1]
        rounds = self._rounds(dout, k)
        dqueries: list[Tensor] = []
        dkeys: list[Tensor] = []
        # Gradients of a key/value head that several ranks used are added up, once each, in float32.
        travellers = sum(len(share.keys) for shares in rounds for share in shares)
        adds = travellers > k.shape[2]
        sum_dtype = torch.promote_types(k.dtype, torch.float32) if adds else k.dtype
        make = dout.new_zeros if adds else dout.new_empty
        for number, shares in enumerate(rounds):
            if chunked:
                queries = (dout, *inputs[:num_queries], saved[-1])
                dout_full, *full = self._all_to_heads(shares, queries, inputs[num_queries:])
                full = [x.flatten(0, 1) for x in full]
                # The form's own order: inputs, out, lse.
                full = [*full[:num_queries], *full[num_queries + 1 :], full[num_queries], kept[number]]
            else:
                (dout_full,) = self._all_to_heads(shares, (dout,), ())
                full = kept
            grads = list(form.backward(dout_full, tuple(full), shares[self.comm.rank].queries))
            del full, dout_full
            # Each result is made when it is needed, in memory that the kernel and the messages before it have left.
            for place in range(num_queries):
                if not number:
                    dqueries.append(dout.new_empty(dout.shape))
                self._to_sequence([share.queries for share in shares], grads.pop(0), dqueries[place])
            for place in range(len(inputs) - num_queries):
                if not number:
                    dkeys.append(make((*dout.shape[:2], *k.shape[2:]), dtype=sum_dtype))
                grad = _without_slots(grads.pop(0), shares[self.comm.rank])
                self._to_sequence([share.keys for share in shares], grad, dkeys[place], adds=adds)
                del grad
        return dqueries, [x.to(k.dtype) for x in dkeys]

    def _rounds(self, q: Tensor, k: Tensor) -> list[Round]:
        return spread_heads(q.shape[2], k.shape[2], self.comm.size, self.head_chunks)

    def _all_to_heads(
        self, shares: Round, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]
    ) -> list[Tensor]:
        """Tensors ``[R, S, N, D]`` and ``[R, S, M, D]`` of all heads to ``[R, T, H, D]`` of this rank's."""
        own = shares[self.comm.rank]
        full = [self._to_heads([share.queries for share in shares], x) for x in queries]
        for x in keys:
            received = self._to_heads([share.keys for share in shares], x)
            slots = None if own.is_even else torch.tensor(own.slots, device=x.device)
            full.append(received if slots is None else received.index_select(2, slots))
        return full

    def _to_heads(self, heads: Sequence[range], x: Tensor) -> Tensor:
        """``[R, S, all heads, D]`` to ``[R, T, H, D]`` of this rank's.

        Args:
            heads: which heads each rank gets.
        """
        rows, length, _, head_dim = x.shape
        per_head, own = rows * length * head_dim, len(heads[self.comm.rank])
        counts = [len(each) * per_head for each in heads]
        sent = x.new_empty(sum(counts))
        for each, chunk in zip(heads, sent.split(counts)):
            chunk.view(rows, length, -1, head_dim).copy_(_cut(x, each))
        received = self.comm.all_to_all(sent, counts, [own * per_head] * self.comm.size)
        # Of a single row this is a view: the ranks' slices follow each other.
        return received.view(self.comm.size, rows, length, own, head_dim).transpose(0, 1).flatten(1, 2)

    def _to_sequence(self, heads: Sequence[range], x: Tensor, target: Tensor, *, adds: bool = False) -> None:
        """``[R, T, H, D]`` of this rank's heads into ``target [R, S, N, D]``, or added to it.

        Args:
            heads: which of the target's heads each rank has.
        """
        size = self.comm.size
        # Of a single row this is a view, and the received chunks are the only copy.
        sent_PRSHD = x.unflatten(1, (size, -1)).transpose(0, 1).contiguous()
        del x
        per_head = sent_PRSHD[0, :, :, 0].numel()
        counts = [len(each) * per_head for each in heads]
        received = self.comm.all_to_all(sent_PRSHD.flatten(), [sent_PRSHD[0].numel()] * size, counts)
        del sent_PRSHD
        if not adds and (even := _even_cut(target, heads)) is not None:
            even.copy_(received.view(even.shape))
            return
        for each, chunk in zip(heads, received.split(counts)):
            part, place = chunk.view(*target.shape[:2], -1, target.shape[3]), _cut(target, each)
            place.add_(part) if adds else place.copy_(part)


def _cut(x: Tensor, heads: range) -> Tensor:
    """The neighbouring ``heads`` of ``[R, S, H, D]``, as a view."""
    return x[:, :, heads.start : heads.stop]


def _even_cut(x: Tensor, heads: Sequence[range]) -> Tensor | None:
    """Each rank's heads of ``[R, S, N, D]`` as a view ``[P, R, S, H, D]``, where they are equally many and far apart.

    To copy into it takes a tenth less time than to copy for each rank.
    """
    step, count = x.shape[2] // len(heads), len(heads[0])
    starts = range(heads[0].start, heads[0].start + step * len(heads), step or 1)
    if x.shape[2] % len(heads) or list(heads) != [range(start, start + count) for start in starts]:
        return None
    return x.unflatten(2, (len(heads), step))[:, :, :, starts[0] : starts[0] + count].permute(2, 0, 1, 3, 4)


def _without_slots(x: Tensor, share: HeadShare) -> Tensor:
    """Gradients of slots ``[R, T, slots, D]`` added up to those of key/value heads."""
    if share.is_even:
        return x
    total = x.new_zeros(
        (*x.shape[:2], len(share.keys), x.shape[3]), dtype=torch.promote_types(x.dtype, torch.float32)
    )
    return total.index_add_(2, torch.tensor(share.slots, device=x.device), x.to(total.dtype)).to(x.dtype)
