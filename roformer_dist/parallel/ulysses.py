"""Ulysses: trade a slice of the sequence for a slice of the heads, attend, and trade back.

Source: Jacobs et al., arXiv 2309.14509; in chunks of heads as in arXiv 2602.21196. What happens between
the two trades is another scheme's: the kernel alone, or a ring of such groups (USP, arXiv 2405.07719).

Shapes: R rows, S this rank's tokens, T = P * S those of the group, N query heads, M key/value heads,
H heads of a message, D head_dim, P ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels.attention import Kernel
from roformer_dist.parallel.attention import LocalScheme, Saved, Scheme
from roformer_dist.parallel.comm import Comm
from roformer_dist.parallel.heads import HeadShare, spread_heads

Round = list[HeadShare]


class UlyssesScheme:
    """All-to-all between sequence and heads.

    The mask is that of the whole micro-batch, the same on every rank. q, k and v travel in one message,
    and so do their gradients. With ``head_chunks`` the heads go through in that many rounds: a round's
    buffers are a fraction of all, what is kept for the backward is local, and the backward sends it again.

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
        rounds = self._rounds(q, k)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        kept: list[Tensor] = []
        for shares in rounds:
            q_full, k_full, v_full = self._to_heads(shares, (q,), (k, v))
            out_full, saved = self.inner.forward(kernel, q_full, k_full, v_full, mask, softmax_scale)
            del q_full, k_full, v_full
            self._to_sequence(shares, (out_full,), (), (out,), ())
            kept += saved if len(rounds) == 1 else saved[-1:]
            del saved
        if len(rounds) == 1:
            # Its shape says how many key/value heads there are.
            return out, (*kept, k.new_empty((0, *k.shape[1:])))
        return out, (*kept, q, k, v, out)

    def backward(
        self, kernel: Kernel, dout: Tensor, saved: Saved, mask: MaskSpec, softmax_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Scheme."""
        chunked = self.head_chunks > 1
        kept, k = (saved[: self.head_chunks], saved[-3]) if chunked else (saved[:-1], saved[-1])
        rounds = self._rounds(dout, k)
        dq = torch.empty_like(dout, memory_format=torch.contiguous_format)
        # Gradients of a key/value head that several ranks used are added up, once each, in float32.
        travellers = sum(len(share.keys) for shares in rounds for share in shares)
        sum_dtype = k.dtype if travellers == k.shape[2] else torch.promote_types(k.dtype, torch.float32)
        dk, dv = (dout.new_zeros((*dout.shape[:2], *k.shape[2:]), dtype=sum_dtype) for _ in range(2))
        for number, shares in enumerate(rounds):
            if chunked:
                q, k, v, out = saved[-4:]
                out_full, dout_full, q_full, k_full, v_full = self._to_heads(shares, (out, dout, q), (k, v))
                flat = (x.flatten(0, 1) for x in (q_full, k_full, v_full, out_full))
                full = (*flat, kept[number])
            else:
                (dout_full,) = self._to_heads(shares, (dout,), ())
                full = kept
            dq_full, dk_full, dv_full = self.inner.backward(kernel, dout_full, full, mask, softmax_scale)
            del full, dout_full
            self._to_sequence(shares, (dq_full,), (dk_full, dv_full), (dq,), (dk, dv))
        return dq, dk.to(k.dtype), dv.to(k.dtype)

    def _rounds(self, q: Tensor, k: Tensor) -> list[Round]:
        return spread_heads(q.shape[2], k.shape[2], self.comm.size, self.head_chunks)

    def _to_heads(self, shares: Round, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]) -> list[Tensor]:
        """Tensors ``[R, S, N, D]`` and ``[R, S, M, D]`` of all heads to ``[R, T, H, D]`` of this rank's."""
        parts = [(x, [share.queries for share in shares]) for x in queries]
        parts += [(x, [share.keys for share in shares]) for x in keys]
        counts = [sum(len(heads[rank]) for _, heads in parts) for rank in range(self.comm.size)]
        rows, length, _, head_dim = (*queries, *keys)[0].shape
        sent_HRSD = (*queries, *keys)[0].new_empty((sum(counts), rows, length, head_dim))
        place = 0
        for rank in range(self.comm.size):
            for x, heads in parts:
                chosen = _cut(x, heads[rank])
                sent_HRSD[place : place + len(heads[rank])] = chosen.permute(2, 0, 1, 3)
                place += len(heads[rank])
        own = self.comm.rank
        received = self.comm.all_to_all(sent_HRSD, counts, [counts[own]] * self.comm.size)
        del sent_HRSD
        widths = [len(heads[own]) for _, heads in parts]
        split = received.unflatten(0, (self.comm.size, counts[own])).split(widths, dim=1)
        full = [part_PHRSD.permute(2, 0, 3, 1, 4).flatten(1, 2) for part_PHRSD in split]
        if shares[own].is_even:
            return full
        slots = torch.tensor(shares[own].slots, device=received.device)
        return full[: len(queries)] + [x.index_select(2, slots) for x in full[len(queries) :]]

    def _to_sequence(
        self,
        shares: Round,
        queries: tuple[Tensor, ...],
        keys: tuple[Tensor, ...],
        query_targets: tuple[Tensor, ...],
        key_targets: tuple[Tensor, ...],
    ) -> None:
        """Tensors ``[R, T, H, D]`` of this rank's heads into targets ``[R, S, N, D]`` and onto ``[R, S, M, D]``."""
        own, size = shares[self.comm.rank], self.comm.size
        full = [*queries, *(_without_slots(x, own) for x in keys)]
        # Each part straight into the message: [P, H, R, S, D].
        widths = [x.shape[2] for x in full]
        rows, length, _, head_dim = full[0].shape
        sent = full[0].new_empty((size, sum(widths), rows, length // size, head_dim))
        for part, x in zip(sent.split(widths, dim=1), full):
            part.copy_(x.unflatten(1, (size, -1)).permute(1, 3, 0, 2, 4))
        counts = [len(queries) * len(s.queries) + len(keys) * len(s.keys) for s in shares]
        received_HRSD = self.comm.all_to_all(sent.flatten(0, 1), [sum(widths)] * size, counts)
        place = 0
        for share in shares:
            for target in query_targets:
                part = received_HRSD[place : place + len(share.queries)]
                _cut(target, share.queries).copy_(part.permute(1, 2, 0, 3))
                place += len(share.queries)
            for target in key_targets:
                part = received_HRSD[place : place + len(share.keys)]
                _cut(target, share.keys).add_(part.permute(1, 2, 0, 3))
                place += len(share.keys)


def _cut(x: Tensor, heads: range) -> Tensor:
    """The neighbouring ``heads`` of ``[R, S, H, D]``, as a view."""
    return x[:, :, heads.start : heads.stop]


def _without_slots(x: Tensor, share: HeadShare) -> Tensor:
    """Gradients of slots ``[R, T, slots, D]`` added up to those of key/value heads."""
    if share.is_even:
        return x
    total = x.new_zeros(
        (*x.shape[:2], len(share.keys), x.shape[3]), dtype=torch.promote_types(x.dtype, torch.float32)
    )
    return total.index_add_(2, torch.tensor(share.slots, device=x.device), x.to(total.dtype)).to(x.dtype)
