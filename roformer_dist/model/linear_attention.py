"""Linear attention of one layer: feature maps, rotated in the numerator only (RoFormer, section 3.3, eq. 19)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels.attention import SequenceOps
from roformer_dist.model.rotary import Phases

FeatureMap = Literal["elu", "softmax"]


def features(q: Tensor, k: Tensor, kind: FeatureMap) -> tuple[Tensor, Tensor]:
    """Positive feature maps of queries and keys ``[R, S, H, D]``, computed in float32, in the inputs' dtype.

    ``elu``: ``elu(x) + 1`` of both (Katharopoulos et al. 2020). ``softmax``: softmax over head_dim of q and
    ``exp(k)`` (Shen et al. 2021); keys beyond 88 overflow to infinity.
    """
    q32, k32 = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    if kind == "softmax":
        return q32.softmax(-1).to(q.dtype), k32.exp().to(k.dtype)
    return _elu_plus_one(q32).to(q.dtype), _elu_plus_one(k32).to(k.dtype)


def _elu_plus_one(x: Tensor) -> Tensor:
    # Written out: elu(x) + 1 rounds to 0 below -17, and a denominator of zeros would be NaN.
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


@dataclass(frozen=True)
class LinearScores:
    """Linear attention; see ``Scores``. Without phases it knows no positions."""

    mask: MaskSpec
    phases: Phases | None
    kind: FeatureMap

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ops: SequenceOps) -> Tensor:
        """See Scores."""
        q, k = features(q, k, self.kind)
        if self.phases is None:
            return ops.linear_attend(q, k, q, k, v, self.mask)
        return ops.linear_attend(self.phases.rotate(q), self.phases.rotate(k), q, k, v, self.mask)
