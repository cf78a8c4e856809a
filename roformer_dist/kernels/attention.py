"""The Kernel protocol, the choice of a kernel, and what a model is given to attend with.

Shapes: R rows, T query length, U key length, N query heads, M key/value heads, D head_dim. A kernel
sees rows flattened into one token axis: ``[R * T, N, D]``; the mask says which document is where.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from roformer_dist.batch import MaskSpec


class Kernel(Protocol):
    """Attention over documents with its own backward; it computes and never communicates.

    ``lse`` is float32 ``[N, tokens]``, the natural log-sum-exp of the scaled scores, ``-inf`` for a
    query that sees no key (its output is 0). ``backward`` takes the *global* ``out`` and ``lse`` of a
    query over all its keys, also when ``k`` and ``v`` are only some of them: partial gradients of
    several calls then add up to the whole. (Differentiating through a merge of partial results
    instead gives an exact forward and wrong gradients, because no kernel's lse has a gradient.)
    """

    name: str

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """``(out [tokens_q, N, D], lse [N, tokens_q])`` for q ``[tokens_q, N, D]``, k and v ``[tokens_k, M, D]``."""
        ...

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
        """``(dq, dk, dv)`` in the shapes and dtypes of q, k and v."""
        ...


@dataclass(frozen=True)
class ScorePart:
    """One region of an attention whose queries and keys are rotated in a way of their own.

    Attributes:
        q, k: ``[R, S, N, D]`` and ``[R, S, M, D]``, rotated for this region.
        mask: the region; the parts of one attention must not overlap (``window``, ``min_distance``).
    """

    q: Tensor
    k: Tensor
    mask: MaskSpec


@dataclass(frozen=True)
class ScoreBias:
    """A term added to the scaled scores, made from distances tile by tile, so that no N^2 tensor is kept.

    Attributes:
        values: float ``[N, ...]``, what the heads differ in; has a gradient if it requires one.
        function: ``(values, distance [T, U])`` to ``[N, T, U]``, differentiable in ``values``; distance is the
            query's position minus the key's. Each head of the result depends on its own ``values[n]`` alone.
        q_positions, k_positions: ``[R, S]`` positions of the queries and of the keys.
    """

    values: Tensor
    function: Callable[[Tensor, Tensor], Tensor]
    q_positions: Tensor
    k_positions: Tensor


class SequenceOps(Protocol):
    """What a model is given for everything that crosses the sequence; it cannot tell one rank from many.

    Shapes: S is this rank's tokens; q ``[R, S, N, D]``, k and v ``[R, S, M, D]``; masks are those of the
    whole micro-batch. Every result is ``[R, S, N, D]`` unless said.
    """

    @property
    def share(self) -> float:
        """What this rank counts of a quantity that each of the ranks of a row computes (1 / sp_size)."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float) -> Tensor:
        """Softmax attention."""
        ...

    def attend_parts(self, parts: Sequence[ScorePart], v: Tensor, softmax_scale: float) -> Tensor:
        """One softmax over the keys of all parts, which see disjoint regions."""
        ...

    def attend_biased(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float, bias: ScoreBias
    ) -> Tensor:
        """Softmax attention whose scaled scores have ``bias`` added."""
        ...

    def linear_attend(
        self, q_rotated: Tensor, k_rotated: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec
    ) -> Tensor:
        """Linear attention of feature maps q and k, positive, rotated in the numerator only (RoFormer, eq. 19)."""
        ...

    def pool(self, x: Tensor, weights: Tensor) -> Tensor:
        """``sum_t weights[r, t] x[r, t]`` over the whole sequence: x ``[R, S, C]``, weights ``[R, S]``, ``[R, C]``.

        Every rank of a row gets the same sum; a loss made from it counts ``share`` on each.
        """
        ...


def choose_kernel(name: str, device: torch.device | str) -> tuple[Kernel, str]:
    """The kernel called ``name`` (``auto``, ``sdpa``, ``reference``) and the reason for the choice.

    Raises:
        ValueError: the named kernel does not run on ``device``.
    """
    from roformer_dist.kernels.reference import ReferenceKernel
    from roformer_dist.kernels.sdpa import SdpaKernel

    device_type = torch.device(device).type
    if name == "reference":
        return ReferenceKernel(), "asked for: float64, quadratic memory, for checking only"
    if device_type == "cpu":
        why = "asked for" if name == "sdpa" else "the device is a CPU"
        return SdpaKernel(), f"{why}: PyTorch's CPU flash attention, by document"
    raise ValueError(
        f"train.kernel = {name!r} has no kernel for device {device_type!r}: PyTorch's CPU flash attention runs "
        'on CPU only; use device cpu (DS_ACCELERATOR=cpu) or train.kernel = "reference"'
    )
