"""GroupComm on real processes says the same as ThreadComm in one, verb by verb, in fp32 and bf16.

So do the schemes on it, when one of the processes comes late to every message.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from spawn import run_ranks
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.parallel.attention import ParallelSequenceOps
from roformer_dist.parallel.comm import Comm, GroupComm
from roformer_dist.parallel.in_process import run_in_process
from roformer_dist.parallel.ring import RingScheme
from roformer_dist.parallel.ulysses import UlyssesScheme

SIZE = 2


def _speak(comm: Comm) -> dict[str, Tensor]:
    said = {}
    for dtype in (torch.float32, torch.bfloat16):
        mine = torch.arange(6, dtype=dtype).view(2, 3) + 10 * comm.rank
        following, previous = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        said |= {
            f"all_to_all {dtype}": comm.all_to_all(mine),
            f"all_to_all, strided, {dtype}": comm.all_to_all(mine.T.reshape(2, 3)),
            f"all_sum {dtype}": comm.all_sum(mine),
            f"all_gather {dtype}": comm.all_gather(mine),
            f"exchange {dtype}": comm.exchange(mine, to=following, source=previous).wait(),
        }
    return said


class _Late:
    """A rank that comes late to whatever it does with others."""

    def __init__(self, comm: Comm) -> None:
        self._comm, self.rank, self.size = comm, comm.rank, comm.size

    def __getattr__(self, verb: str) -> Any:
        time.sleep(0.02)
        return getattr(self._comm, verb)


def _attend(comm: Comm) -> dict[str, Tensor]:
    """What two layers after each other give, and their gradients, under each scheme."""
    mask = MaskSpec.from_lengths([13, 1, 26], causal=True)
    schemes = {
        "ring": RingScheme(comm),
        "Ulysses": UlyssesScheme(comm),
        "Ulysses in chunks": UlyssesScheme(comm, head_chunks=2),
    }
    found = {}
    for name, scheme in schemes.items():
        generator = torch.Generator().manual_seed(comm.rank)
        q = torch.randn(1, 20, 4, 8, generator=generator, requires_grad=True)
        k, v = (torch.randn(1, 20, 2, 8, generator=generator, requires_grad=True) for _ in range(2))
        ops = ParallelSequenceOps(SdpaKernel(), scheme)
        out = ops.attend(ops.attend(q, k, v, mask, 0.3), k, v, mask, 0.3)
        grads = torch.autograd.grad((out**2).sum(), (q, k, v))
        found |= {f"{name}: {what}": x for what, x in zip(("out", "dq", "dk", "dv"), (out.detach(), *grads))}
    return found


def _in_group(rank: int, world_size: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    comm = GroupComm()
    return _speak(comm), _attend(_Late(comm) if rank == 1 else comm)


def test_both_implementations_deliver_the_same():
    ours, group = run_in_process(SIZE, _speak), run_ranks(SIZE, _in_group)
    theirs = [said for said, _ in group]
    for rank, expected in enumerate(run_in_process(SIZE, _attend)):
        for what, tensor in group[rank][1].items():
            torch.testing.assert_close(
                tensor, expected[what], rtol=1e-5, atol=1e-6, msg=f"{what}, rank {rank}"
            )
    for rank in range(SIZE):
        assert ours[rank].keys() == theirs[rank].keys()
        for verb, tensor in ours[rank].items():
            torch.testing.assert_close(theirs[rank][verb], tensor, rtol=0, atol=0, msg=f"{verb}, rank {rank}")


def test_literal_exchange_and_all_to_all():
    said = run_in_process(SIZE, _speak)
    assert said[0]["all_to_all torch.float32"].tolist() == [[0, 1, 2], [10, 11, 12]]
    assert said[1]["all_to_all torch.float32"].tolist() == [[3, 4, 5], [13, 14, 15]]
    assert said[0]["exchange torch.float32"].tolist() == [[10, 11, 12], [13, 14, 15]]


def _one_fails(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("this rank fails")
    GroupComm().all_sum(torch.ones(1))


def test_a_failing_process_is_named_and_ends_the_call():
    with pytest.raises(AssertionError, match=r"this rank fails|Connection"):
        run_ranks(SIZE, _one_fails, timeout_s=60)
