"""From a group and a kernel to the SequenceOps and the layout that belong together."""

from __future__ import annotations

from roformer_dist.kernels.attention import Kernel
from roformer_dist.parallel.attention import LocalScheme, ParallelSequenceOps
from roformer_dist.parallel.comm import Comm
from roformer_dist.parallel.layout import ContiguousLayout
from roformer_dist.parallel.ulysses import UlyssesScheme


def single_sequence_ops(kernel: Kernel) -> ParallelSequenceOps:
    """The whole sequence on one rank."""
    return ParallelSequenceOps(kernel, LocalScheme())


def sequence_ops(kernel: Kernel, sp: Comm) -> tuple[ParallelSequenceOps, ContiguousLayout]:
    """The operations of this rank of ``sp``, and the layout by which its batches are sliced."""
    scheme = UlyssesScheme(sp) if sp.size > 1 else LocalScheme()
    return ParallelSequenceOps(kernel, scheme), ContiguousLayout(sp.size)
