"""The Kernel protocol, the choice of a kernel, and what a model is given to attend with.

Shapes: R rows, T query length, U key length, N query heads, M key/value heads, D head_dim. A kernel
sees rows flattened into one token axis: ``[R * T, N, D]``; the mask says which document is where.
"""

from __future__ import annotations

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


class SequenceOps(Protocol):
    """What a model is given for everything that crosses the sequence; it cannot tell one rank from many."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float) -> Tensor:
        """Attention of q ``[R, S, N, D]`` over k, v ``[R, S, M, D]`` (S: this rank's tokens), ``[R, S, N, D]``."""
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
