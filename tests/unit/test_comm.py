"""The verbs of Comm between threads of one process, and what happens when one of them fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from roformer_dist.parallel.comm import Comm
from roformer_dist.parallel.in_process import run_in_process

SIZES = [1, 2, 3, 5]


def within_seconds(function: Callable[[], Any]) -> Any:
    """The result or the error of ``function``; a hang is a failure after ten seconds, not a stuck run."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert outcome, "the ranks hang"
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def tagged(sender: int, receiver: int) -> Tensor:
    return torch.tensor([sender, receiver, 10 * sender + receiver])


@pytest.mark.parametrize("size", SIZES)
def test_results_come_in_the_order_of_ranks(size: int) -> None:
    assert run_in_process(size, lambda comm: (comm.rank, comm.size)) == [(r, size) for r in range(size)]


@pytest.mark.parametrize("size", SIZES)
def test_all_to_all_brings_chunk_i_from_rank_i(size: int) -> None:
    def rank(comm: Comm) -> Tensor:
        return comm.all_to_all(torch.stack([tagged(comm.rank, to) for to in range(size)]))

    for receiver, received in enumerate(run_in_process(size, rank)):
        assert torch.equal(received, torch.stack([tagged(sender, receiver) for sender in range(size)]))


@pytest.mark.parametrize("size", SIZES)
def test_all_to_all_twice_gives_everything_back(size: int) -> None:
    def rank(comm: Comm) -> bool:
        chunks = torch.randn(size, 3, 2)
        return torch.equal(comm.all_to_all(comm.all_to_all(chunks)), chunks)

    assert all(run_in_process(size, rank))


@pytest.mark.parametrize("size", SIZES)
def test_exchange_passes_messages_round_a_ring_in_order(size: int) -> None:
    def rank(comm: Comm) -> list[list[int]]:
        following, before = (comm.rank + 1) % size, (comm.rank - 1) % size
        # Two under way at once, as a ring that overlaps computing and sending has.
        pending = [
            comm.exchange(torch.tensor([comm.rank, turn]), to=following, source=before) for turn in range(2)
        ]
        return [message.wait().tolist() for message in pending]

    for receiver, messages in enumerate(run_in_process(size, rank)):
        assert messages == [[(receiver - 1) % size, 0], [(receiver - 1) % size, 1]]


def test_a_tensor_goes_round_the_ring_and_comes_home() -> None:
    def rank(comm: Comm) -> list[int]:
        seen, tensor = [], torch.tensor(comm.rank)
        for _ in range(4):
            tensor = comm.exchange(tensor, to=(comm.rank + 1) % 4, source=(comm.rank - 1) % 4).wait()
            seen.append(int(tensor))
        return seen

    assert run_in_process(4, rank)[0] == [3, 2, 1, 0]


@pytest.mark.parametrize("size", SIZES)
def test_all_sum_is_the_same_bits_on_every_rank(size: int) -> None:
    def rank(comm: Comm) -> Tensor:
        generator = torch.Generator().manual_seed(comm.rank)
        return comm.all_sum(torch.randn(1000, generator=generator))

    sums = run_in_process(size, rank)
    expected = sum(
        torch.randn(1000, generator=torch.Generator().manual_seed(r)).double() for r in range(size)
    )
    assert all(torch.equal(s, sums[0]) for s in sums)
    assert (sums[0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_all_gather_is_in_the_order_of_ranks(size: int) -> None:
    gathered = run_in_process(size, lambda comm: comm.all_gather(torch.full((2, 3), comm.rank)))
    for tensor in gathered:
        assert tensor.shape == (size, 2, 3)
        assert tensor[:, 0, 0].tolist() == list(range(size))


def test_what_was_sent_may_be_overwritten_and_what_came_is_one_s_own() -> None:
    def rank(comm: Comm) -> list[Tensor]:
        mine = torch.full((2,), float(comm.rank))
        pending = comm.exchange(mine, to=1 - comm.rank, source=1 - comm.rank)
        first = pending.wait()
        mine.fill_(-1)
        gathered = comm.all_gather(torch.full((2,), float(comm.rank)))
        gathered.add_(100 * comm.rank)
        return [first, gathered, comm.all_sum(torch.ones(2))]

    zero, one = run_in_process(2, rank)
    assert (zero[0].tolist(), one[0].tolist()) == ([1, 1], [0, 0])
    assert zero[1].tolist() == [[0, 0], [1, 1]]
    assert one[1].tolist() == [[100, 100], [101, 101]]
    assert zero[2].tolist() == [2, 2]


def test_many_rounds_do_not_mix() -> None:
    def rank(comm: Comm) -> list[int]:
        return [int(comm.all_sum(torch.tensor(turn * (comm.rank + 1)))) for turn in range(200)]

    assert run_in_process(3, rank) == [[6 * turn for turn in range(200)]] * 3


def test_backward_passes_of_ranks_may_communicate() -> None:
    # Autograd's shared device thread would run them one after the other, and the first would wait for ever.
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:
            ctx.comm = comm
            return comm.all_sum(x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
            return ctx.comm.all_sum(grads[0]), None

    def rank(comm: Comm) -> float:
        x = torch.tensor(float(comm.rank), requires_grad=True)
        (Doubled.apply(x, comm) * (comm.rank + 1)).backward()
        return float(x.grad)

    assert within_seconds(lambda: run_in_process(3, rank)) == [6.0, 6.0, 6.0]


class Broken(Exception):
    pass


def wait_in_all_sum(comm: Comm) -> None:
    comm.all_sum(torch.ones(1))


def wait_in_all_to_all(comm: Comm) -> None:
    comm.all_to_all(torch.ones(comm.size, 1))


def wait_in_all_gather(comm: Comm) -> None:
    comm.all_gather(torch.ones(1))


def wait_for_a_message(comm: Comm) -> None:
    comm.exchange(torch.ones(1), to=0, source=1).wait()


@pytest.mark.parametrize(
    "wait",
    [wait_in_all_sum, wait_in_all_to_all, wait_in_all_gather, wait_for_a_message],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("late", [False, True], ids=["at once", "while the others wait"])
def test_an_error_on_one_rank_is_raised_and_nobody_hangs(wait: Callable[[Comm], None], late: bool) -> None:
    waiting = threading.Barrier(3)

    def rank(comm: Comm) -> None:
        if comm.rank == 1:
            if late:
                waiting.wait()
            raise Broken("rank 1 is ill")
        if late:
            waiting.wait()
        wait(comm)

    with pytest.raises(Broken, match="rank 1 is ill"):
        within_seconds(lambda: run_in_process(3, rank))


def test_shapes_that_do_not_match_are_an_error_and_no_hang() -> None:
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        within_seconds(lambda: run_in_process(2, lambda comm: comm.all_sum(torch.ones(comm.rank + 1))))


def test_a_rank_that_leaves_early_is_an_error_and_not_a_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("roformer_dist.parallel.in_process.MEETING_TIMEOUT_S", 0.2)
    with pytest.raises(TimeoutError, match="not all 2 in-process ranks"):
        run_in_process(2, lambda comm: comm.all_sum(torch.ones(1)) if comm.rank else None)
