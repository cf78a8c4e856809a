"""Attention in parts and with a bias as forms: what is computed over whole rows with some of the heads.

Shapes: R rows, T all tokens of a row, H heads of this rank, D head_dim; keys may be of other tokens than queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels.attention import Kernel, ScoreBias
from roformer_dist.kernels.biased import biased_backward, biased_forward
from roformer_dist.kernels.parts import parts_backward, parts_forward


@dataclass(frozen=True)
class PartsForm:
    """One softmax over parts; inputs are the q of each part, the k of each part, and v."""

    kernel: Kernel
    masks: Sequence[MaskSpec]
    softmax_scale: float

    def forward(self, full: Sequence[Tensor], heads: range) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See Form."""
        *pairs, v = flat = [x.flatten(0, 1) for x in full]
        out, lse = parts_forward(self.kernel, self._parts(pairs), v, self.softmax_scale)
        return out.view(full[0].shape), (*flat, out, lse)

    def backward(self, dout: Tensor, saved: Sequence[Tensor], heads: range) -> Sequence[Tensor]:
        """See Form."""
        *pairs, v, out, lse = saved
        parts = self._parts(pairs)
        d_pairs, dv = parts_backward(self.kernel, dout.flatten(0, 1), parts, v, out, lse, self.softmax_scale)
        grads = [dq for dq, _ in d_pairs] + [dk for _, dk in d_pairs] + [dv]
        return [x.unflatten(0, (dout.shape[0], -1)) for x in grads]

    def _parts(self, pairs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, MaskSpec]]:
        count = len(self.masks)
        return list(zip(pairs[:count], pairs[count:], self.masks, strict=True))


@dataclass(frozen=True)
class BiasedForm:
    """Softmax with a bias: ``bias`` is that of all heads and tokens; ``dvalues`` collects its gradient by head."""

    mask: MaskSpec
    softmax_scale: float
    bias: ScoreBias
    dvalues: Tensor | None = None

    def forward(self, full: Sequence[Tensor], heads: range) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See Form."""
        q, k, v = flat = [x.flatten(0, 1) for x in full]
        out, lse = biased_forward(q, k, v, self.mask, self.softmax_scale, self._of(heads, False))
        return out.view(full[0].shape), (*flat, out, lse)

    def backward(self, dout: Tensor, saved: Sequence[Tensor], heads: range) -> Sequence[Tensor]:
        """See Form."""
        bias = self._of(heads, self.dvalues is not None)
        q, k, v, out, lse = saved
        *grads, dvalues = biased_backward(
            dout.flatten(0, 1), q, k, v, out, lse, self.mask, self.softmax_scale, bias
        )
        if self.dvalues is not None and dvalues is not None:
            self.dvalues[heads.start : heads.stop] = dvalues
        return [x.unflatten(0, (dout.shape[0], -1)) for x in grads]

    def _of(self, heads: range, wants_gradient: bool) -> ScoreBias:
        values = self.bias.values.detach()[heads.start : heads.stop].requires_grad_(wants_gradient)
        positions = self.bias.q_positions.flatten(), self.bias.k_positions.flatten()
        return ScoreBias(values, self.bias.function, *positions)
