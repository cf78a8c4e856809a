"""The grid of ranks: dp replicas x sp ranks that share one sequence, sp = ring x Ulysses."""

from __future__ import annotations

from dataclasses import dataclass

from roformer_dist.parallel.comm import Comm


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the grid, ``rank = (dp_rank * ring_size + ring_rank) * ulysses_size + ulysses_rank``.

    Ranks of one sequence are neighbours, and among them those of one all-to-all: Ulysses, the heaviest
    traffic, stays inside a node wherever ulysses_size fits one, and the ring goes between the nodes.
    """

    dp_size: int
    dp_rank: int
    world: Comm
    sp: Comm
    ulysses: Comm
    ring: Comm


def build_mesh(world: Comm, *, ulysses_size: int, ring_size: int = 1) -> Mesh:
    """Split ``world``, whose size is a multiple of ``ulysses_size * ring_size``, into the groups of the grid."""
    sp_size = ulysses_size * ring_size
    assert world.size % sp_size == 0, f"{world.size} ranks make no groups of {sp_size}"
    dp_rank, sp_rank = divmod(world.rank, sp_size)
    sp = world if world.size == sp_size else world.split(dp_rank)
    return Mesh(
        dp_size=world.size // sp_size,
        dp_rank=dp_rank,
        world=world,
        sp=sp,
        ulysses=sp if ring_size == 1 else world.split(world.rank // ulysses_size),
        ring=sp if ulysses_size == 1 else world.split(dp_rank * ulysses_size + sp_rank % ulysses_size),
    )
