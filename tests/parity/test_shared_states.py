"""The states that linear attention passes between ranks: what is sent, and faults that must be found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import differences, make_batch, many_ranks, model_config, one_process
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.parallel.comm import Comm
from roformer_dist.parallel.counting import CountingComm
from roformer_dist.parallel.in_process import run_in_process
from roformer_dist.parallel.layout import ContiguousLayout, Layout, ZigzagLayout
from roformer_dist.parallel.mesh import Mesh, build_mesh
from roformer_dist.parallel.sequence_ops import sequence_ops
from roformer_dist.parallel.states import SharedStates, plan_states

LINEAR: dict[str, Any] = {"layers": ["linear"]}


@pytest.mark.parametrize("layout", [ContiguousLayout(4), ZigzagLayout(4), ZigzagLayout(2, 2)])
@pytest.mark.parametrize("causal", [True, False])
def test_each_piece_reads_what_its_tokens_see(layout: Layout, causal: bool) -> None:
    mask = MaskSpec.from_lengths([9, 1, 14, 24], causal=causal)
    document = torch.repeat_interleave(torch.arange(4), mask.cu_seqlens_q.diff())
    places = [(each + torch.tensor([[0], [24]])).flatten() for each in layout.all_indices(mask, 2)]
    plans = [plan_states(layout, mask, 2, rank) for rank in range(4)]
    slots = plans[0].slots
    held = {
        rank * slots + piece.slot: places[rank][piece.tokens]
        for rank, plan in enumerate(plans)
        for piece in plan.pieces
        if piece.slot is not None
    }
    for rank, plan in enumerate(plans):
        for piece in plan.pieces:
            own = places[rank][piece.tokens]
            same = torch.nonzero(document == document[own[0]]).flatten().tolist()
            others = [place for place in same if place not in own]
            keys = [place for place in others if not causal or place < own[0]]
            queries = [place for place in others if not causal or place > own[0]]
            for slots_read, expected in ((piece.before, keys), (piece.after, queries)):
                assert sorted(place for slot in slots_read for place in held[slot].tolist()) == expected


def sent(ulysses_size: int, ring_size: int, lengths: list[int]) -> list[list[int]]:
    mask = MaskSpec.from_lengths(lengths, causal=True)

    def rank(comm: Comm) -> list[int]:
        counting = CountingComm(comm)
        mesh = build_mesh(counting, ulysses_size=ulysses_size, ring_size=ring_size)
        ops, layout = sequence_ops(SdpaKernel(), mesh)
        counting.messages.clear()
        local = layout.local_seq_len(sum(lengths))
        streams = [torch.rand(1, local, heads, 8, requires_grad=True) for heads in (4, 2, 4, 2, 2)]
        ops.linear_attend(*streams, mask).sum().backward()
        return [message.sent for message in counting.messages]

    return run_in_process(ulysses_size * ring_size, rank)


@pytest.mark.parametrize(
    ("mesh", "lengths", "slots"),
    [
        ((4, 1), [64], 1),
        ((4, 1), [256], 1),
        ((1, 4), [64], 2),
        ((4, 1), [24, 24, 16], 2),
        ((2, 1), [8, 8], 0),
    ],
)
def test_states_are_all_that_is_sent(mesh: tuple[int, int], lengths: list[int], slots: int) -> None:
    size = mesh[0] * mesh[1]
    one_way = 4 * (size - 1) * slots * 2 * 8 * 9
    assert sent(*mesh, lengths) == [[one_way] * 2 if slots else []] * size


class Forgets(SharedStates):
    """Backward, the states of other ranks' queries are lost."""

    def backward(self, *call: Any) -> Any:
        comm, self.comm = self.comm, Silent(self.comm)
        grads = super().backward(*call)
        self.comm = comm
        return grads


class Silent(CountingComm):
    def all_gather(self, tensor: Tensor) -> Tensor:
        everyone = torch.zeros_like(self.inner.all_gather(tensor))
        everyone[self.rank] = tensor
        return everyone


@pytest.mark.parametrize("mesh", [(3, 1), (1, 2)], ids=["contiguous", "zigzag"])
def test_states_that_do_not_arrive_are_found(mesh: tuple[int, int]) -> None:
    model, batch = model_config(**LINEAR), make_batch()

    def faulty(grid: Mesh) -> Any:
        ops, layout = sequence_ops(SdpaKernel(), grid)
        ops._states = Forgets(grid.sp, layout)
        return ops

    reference = one_process(model, batch, masked=False)
    wrong = differences(many_ranks(mesh, model, batch, masked=False, make_ops=faulty), reference)
    assert "loss" not in wrong
    assert "blocks.0.attention.k_proj.weight" in wrong
