"""GroupComm on real processes says the same as ThreadComm in one, verb by verb, in fp32 and bf16."""

from __future__ import annotations

import pytest
import torch
from spawn import run_ranks
from torch import Tensor

from roformer_dist.parallel.comm import Comm, GroupComm
from roformer_dist.parallel.in_process import run_in_process

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


def _in_group(rank: int, world_size: int) -> dict[str, Tensor]:
    return _speak(GroupComm())


def test_both_implementations_deliver_the_same():
    ours, theirs = run_in_process(SIZE, _speak), run_ranks(SIZE, _in_group)
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
