"""From a mesh and a kernel to the SequenceOps and the layout that belong together."""

from __future__ import annotations

from roformer_dist.kernels.attention import Kernel
from roformer_dist.parallel.attention import LocalScheme, ParallelSequenceOps, Scheme
from roformer_dist.parallel.layout import Layout, choose_layout
from roformer_dist.parallel.mesh import Mesh
from roformer_dist.parallel.ring import RingScheme
from roformer_dist.parallel.ulysses import UlyssesScheme


def single_sequence_ops(kernel: Kernel) -> ParallelSequenceOps:
    """The whole sequence on one rank."""
    return ParallelSequenceOps(kernel, LocalScheme())


def sequence_ops(kernel: Kernel, mesh: Mesh, head_chunks: int = 1) -> tuple[ParallelSequenceOps, Layout]:
    """The operations of this rank of ``mesh``, and the layout by which its batches are sliced.

    Hybrid is Ulysses around a ring: a rank trades inside its node for whole pieces of the sequence and
    some of the heads, and goes round the ring with these.
    """
    scheme: Scheme = RingScheme(mesh.ring) if mesh.ring.size > 1 else LocalScheme()
    if mesh.ulysses.size > 1 or head_chunks > 1:
        scheme = UlyssesScheme(mesh.ulysses, scheme, head_chunks)
    layout = choose_layout(mesh.ulysses.size, mesh.ring.size)
    return ParallelSequenceOps(kernel, scheme, mesh.sp, layout), layout
