"""The grid of processes: dp replicas x sp ranks that share one sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from roformer_dist.parallel.comm import Comm, GroupComm


@dataclass(frozen=True)
class Mesh:
    """This process's place in the grid.

    Ranks of one sequence are neighbours (``rank = dp_rank * sp_size + sp_rank``), so that the
    all-to-all, the heaviest traffic, stays inside a node wherever sp_size fits one.
    """

    dp_size: int
    dp_rank: int
    sp: Comm
    world: Comm


def build_mesh(sp_size: int) -> Mesh:
    """Make the groups; torch.distributed must be initialised, with a world size divisible by ``sp_size``."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own: dist.ProcessGroup | None = None
    # Every process takes part in the making of every group, in the same order.
    for start in range(0, world_size, sp_size):
        group = dist.new_group(list(range(start, start + sp_size)))
        if start <= rank < start + sp_size:
            assert isinstance(group, dist.ProcessGroup)
            own = group
    return Mesh(
        dp_size=world_size // sp_size,
        dp_rank=rank // sp_size,
        sp=GroupComm(own),
        world=GroupComm(),
    )
