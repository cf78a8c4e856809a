"""Ulysses: trade a slice of the sequence for a slice of the heads, attend, and trade back.

Source: Jacobs et al., arXiv 2309.14509. Shapes: R rows, S this rank's tokens, T = P * S the whole
sequence, N query heads, M key/value heads, D head_dim, P ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels.attention import Kernel
from roformer_dist.parallel.attention import Saved
from roformer_dist.parallel.comm import Comm


class UlyssesScheme:
    """All-to-all between sequence and heads; P must divide N and M (checked with the configuration).

    The mask is that of the whole micro-batch, the same on every rank, because each rank attends over
    whole rows. q, k and v travel in one message, and so do their gradients.
    """

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def forward(
        self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float
    ) -> tuple[Tensor, Saved]:
        """See Scheme."""
        rows = q.shape[0]
        q_full, k_full, v_full = (x.flatten(0, 1) for x in self._to_heads(q, k, v))
        out, lse = kernel.forward(q_full, k_full, v_full, mask, softmax_scale)
        (local_out,) = self._to_sequence(out.unflatten(0, (rows, -1)))
        return local_out, (q_full, k_full, v_full, out, lse)

    def backward(
        self, kernel: Kernel, dout: Tensor, saved: Saved, mask: MaskSpec, softmax_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Scheme."""
        rows = dout.shape[0]
        q, k, v, out, lse = saved
        (dout_full,) = self._to_heads(dout)
        grads = kernel.backward(dout_full.flatten(0, 1), q, k, v, out, lse, mask, softmax_scale)
        dq, dk, dv = self._to_sequence(*(g.unflatten(0, (rows, -1)) for g in grads))
        return dq, dk, dv

    def _to_heads(self, *locals_RSHD: Tensor) -> list[Tensor]:
        """Tensors ``[R, S, H, D]`` of all heads to ``[R, T, H / P, D]`` of this rank's heads."""
        size = self.comm.size
        parts = [x.unflatten(2, (size, -1)) for x in locals_RSHD]
        widths = [part.shape[3] for part in parts]
        sent = torch.cat(parts, dim=3).permute(2, 0, 1, 3, 4)
        received_PRSHD = self.comm.all_to_all(sent)
        full_RTHD = received_PRSHD.transpose(0, 1).flatten(1, 2)
        return [part.contiguous() for part in full_RTHD.split(widths, dim=2)]

    def _to_sequence(self, *fulls_RTHD: Tensor) -> list[Tensor]:
        """Tensors ``[R, T, H / P, D]`` of this rank's heads to ``[R, S, H, D]`` of all heads."""
        size = self.comm.size
        widths = [x.shape[2] for x in fulls_RTHD]
        sent = torch.cat(fulls_RTHD, dim=2).unflatten(1, (size, -1)).transpose(0, 1)
        received_PRSHD = self.comm.all_to_all(sent)
        parts = received_PRSHD.split(widths, dim=3)
        # Rank i held heads i * H/P to (i + 1) * H/P: the rank's axis goes in front of its heads.
        return [part.permute(1, 2, 0, 3, 4).flatten(2, 3) for part in parts]
