"""A ring's own mistakes, planted: a hop left out, halves reversed, stale or reused buffers, doubled gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from comparison import differences, make_batch, many_ranks, model_config, one_process
from torch import Tensor

from roformer_dist.batch import Batch
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.parallel.attention import ParallelSequenceOps
from roformer_dist.parallel.comm import Comm, Pending
from roformer_dist.parallel.hops import Hop
from roformer_dist.parallel.layout import ZigzagLayout
from roformer_dist.parallel.ring import RingScheme
from roformer_dist.parallel.ulysses import UlyssesScheme


@dataclass
class HarshComm:
    """Takes a message's content only when it is waited for, late on one rank, and spoils what was sent.

    What all ranks do together (all_to_all, sums, gathers) that rank comes to late as well.

    A scheme that writes to a buffer under way, or uses it again before its message is done, sends
    what it wrote; one that reads a sent buffer after that reads NaN.
    """

    inner: Comm
    slow_rank: int = 1

    def __post_init__(self) -> None:
        self.rank, self.size = self.inner.rank, self.inner.size

    def exchange(
        self, tensor: Tensor, *, to: int, source: int, shape: Sequence[int] | None = None
    ) -> Pending:
        return _Late(self, tensor, to, source, shape)

    def split(self, number: int) -> Comm:
        return HarshComm(self.inner.split(number), self.slow_rank)

    def __getattr__(self, verb: str) -> Any:
        if self.rank == self.slow_rank:
            time.sleep(0.003)
        return getattr(self.inner, verb)


@dataclass
class _Late:
    comm: HarshComm
    tensor: Tensor
    to: int
    source: int
    shape: Sequence[int] | None

    def wait(self) -> Tensor:
        if self.comm.rank == self.comm.slow_rank:
            time.sleep(0.003)
        # Every rank waits for its messages in the order in which it posted them.
        came = self.comm.inner.exchange(self.tensor, to=self.to, source=self.source, shape=self.shape).wait()
        if self.tensor.is_floating_point():
            self.tensor.fill_(torch.nan)
        return came


@pytest.mark.parametrize(
    ("mesh", "chunks"), [((1, 4), 1), ((2, 3), 1), ((4, 1), 1), ((4, 1), 2), ((2, 2), 2)], ids=str
)
@pytest.mark.parametrize("window", [None, 4])
def test_late_messages_and_spoilt_buffers_change_nothing(
    mesh: tuple[int, int], chunks: int, window: int | None
) -> None:
    layers = ("full", "linear") if window is None else ("full",)
    model, batch = model_config(layers=layers), make_batch(window=window)
    found = many_ranks(mesh, model, batch, masked=False, wrap=HarshComm, head_chunks=chunks)
    assert differences(found, one_process(model, batch, masked=False)) == []


class Reuses(RingScheme):
    """One buffer for all the keys that are sent, filled again while the last message is under way."""

    buffer: Tensor | None = None

    def _send_keys(self, hop: Hop, k: Tensor, v: Tensor) -> Pending:
        message = torch.stack([k, v])
        if self.buffer is None or self.buffer.shape != message.shape:
            self.buffer = torch.empty_like(message)
        pending = self.comm.exchange(self.buffer, to=hop.to, source=hop.source, shape=message.shape)
        self.buffer.copy_(message.roll(1, dims=1) if hop.to == 0 else message)
        return pending


class SkipsAHop(RingScheme):
    def _plan(self, key: Any) -> list[Hop]:
        hops = super()._plan(key)
        return [replace(hop, calls=()) if number == 1 else hop for number, hop in enumerate(hops)]


class SkipsAHopHomewards(RingScheme):
    """The gradients of one hop do not come home: the forward is right."""

    def _collect(self, dk: Tensor, dv: Tensor, returning: tuple[Hop, Pending] | None) -> None:
        if returning and (returning[0].to - self.comm.rank) % self.comm.size == 1:
            returning[1].wait()
            return
        super()._collect(dk, dv, returning)


class StaleKeys(RingScheme):
    """The backward computes a hop with the keys of the hop before: the forward is right."""

    def backward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        visits = self._visits

        def stale(*given: Any) -> Any:
            before = None
            for hop, keys, values in visits(*given):
                fits = before is not None and len(before) >= len(keys)
                yield hop, (before[: len(keys)] if fits else keys), values
                before = keys

        self._visits = stale
        try:
            return super().backward(*arguments)
        finally:
            self._visits = visits


class OwnLse(RingScheme):
    """The backward of each hop is given that hop's own normaliser, as autograd through a merge has it."""

    def backward(self, kernel: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        class Local(SdpaKernel):
            def backward(self, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any) -> Any:
                out, lse = super().forward(q, k, v, *rest)
                return super().backward(dout, q, k, v, out, lse, *rest)

        return super().backward(Local(), *arguments)


@pytest.mark.parametrize(
    ("scheme", "loss_shows_it"),
    [(SkipsAHop, True), (SkipsAHopHomewards, False), (StaleKeys, False), (OwnLse, False)],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "masked"])
def test_a_faulty_ring_is_found(scheme: type[RingScheme], loss_shows_it: bool, causal: bool) -> None:
    model, batch = model_config(), make_batch(causal=causal)
    found = many_ranks(
        (1, 3),
        model,
        batch,
        masked=not causal,
        make_ops=lambda mesh: ParallelSequenceOps(SdpaKernel(), scheme(mesh.ring)),
    )
    wrong = differences(found, one_process(model, batch, masked=not causal))
    assert ("loss" in wrong) == loss_shows_it
    assert "blocks.0.attention.k_proj.weight" in wrong


def test_a_buffer_reused_while_its_message_is_under_way_is_found() -> None:
    # Whole rows, both directions: every message has the same shape, and the buffer is used again at once.
    model, batch = model_config(), make_batch(causal=False, seq_len=24)
    wrong = differences(
        many_ranks(
            (1, 3),
            model,
            batch,
            masked=True,
            wrap=HarshComm,
            make_ops=lambda mesh: ParallelSequenceOps(SdpaKernel(), Reuses(mesh.ring)),
        ),
        one_process(model, batch, masked=True),
    )
    assert "loss" in wrong


def test_a_reversed_half_is_found() -> None:
    def reverse(part: Batch, rank: int) -> Batch:
        if rank != 1:
            return part
        half = part.input_ids.shape[1] // 2
        order = torch.cat([torch.arange(half).flip(0), torch.arange(half, part.input_ids.shape[1])])
        fields = ("input_ids", "labels", "position_ids", "counters")
        return replace(part, **{name: getattr(part, name)[:, order] for name in fields})

    model, batch = model_config(), make_batch()
    found = many_ranks((1, 2), model, batch, masked=False, damage_slice=reverse)
    assert "loss" in differences(found, one_process(model, batch, masked=False))


class SumsTwice(UlyssesScheme):
    """A key/value head that went to two ranks gets its gradient from both, twice."""

    def _to_sequence(self, heads: Any, x: Tensor, target: Tensor, *, adds: bool = False) -> None:
        super()._to_sequence(heads, x, target, adds=adds)
        target.mul_(2 if adds else 1)


def test_replicated_gradients_summed_twice_are_found() -> None:
    model, batch = model_config(num_kv_heads=1), make_batch()
    make: Callable[[Any], Any] = lambda mesh: ParallelSequenceOps(SdpaKernel(), SumsTwice(mesh.ulysses))  # noqa: E731
    wrong = differences(
        many_ranks((4, 1), model, batch, masked=False, make_ops=make), one_process(model, batch, masked=False)
    )
    assert "loss" not in wrong
    assert "blocks.0.attention.v_proj.weight" in wrong


def test_the_batch_of_these_tests_has_documents_on_several_ranks() -> None:
    batch = make_batch()
    holdings = ZigzagLayout(3).holdings(ZigzagLayout(3).slice(batch, 0).mask, 3)
    assert max(sum(number in h.document for h in holdings) for number in range(9)) == 3
