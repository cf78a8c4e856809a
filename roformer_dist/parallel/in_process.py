"""Comm between ranks of one process: P threads that meet at a barrier and leave each other messages.

It carries tests, parity checks at sizes no laptop could spawn, and studies on one GPU (NCCL refuses
several ranks on a device).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from roformer_dist.parallel.comm import Arrived, Comm, Pending

Result = TypeVar("Result")
# Longer than any honest difference between the ranks' work between two calls.
MEETING_TIMEOUT_S = 300


class _Board:
    """Where the threads of one in-process group leave tensors for each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)
        self.mail = [[_Mail() for _ in range(size)] for _ in range(size)]
        self.aborted = False
        self.parts: dict[tuple[int, ...], _Board] = {}
        self.lock = threading.Lock()

    def part(self, ranks: tuple[int, ...]) -> _Board:
        """The board of some of the ranks; it falls with this one."""
        with self.lock:
            board = self.parts.setdefault(ranks, _Board(len(ranks)))
        if self.aborted:
            board.abort()
        return board

    def wait(self) -> None:
        """Meet the other ranks.

        Raises:
            BrokenBarrierError: another rank failed.
            TimeoutError: another rank has left, or never made the same call.
        """
        try:
            self.barrier.wait(MEETING_TIMEOUT_S)
        except threading.BrokenBarrierError:
            if self.aborted:
                raise
            raise TimeoutError(
                f"not all {self.size} in-process ranks came to the same call within {MEETING_TIMEOUT_S} s"
            ) from None

    def abort(self) -> None:
        """Wake every rank that waits, with an error."""
        self.aborted = True
        self.barrier.abort()
        for row in self.mail:
            for box in row:
                box.close()
        with self.lock:
            parts = list(self.parts.values())
        for part in parts:
            part.abort()


class _Mail:
    """Messages from one rank to another; the n-th request gets the n-th message, whenever it is waited for."""

    def __init__(self) -> None:
        self.arrived = threading.Condition()
        self.messages: dict[int, Tensor] = {}
        self.posted = self.requested = 0
        self.closed = False

    def put(self, tensor: Tensor) -> None:
        with self.arrived:
            self.messages[self.posted] = tensor
            self.posted += 1
            self.arrived.notify_all()

    def request(self) -> int:
        with self.arrived:
            self.requested += 1
            return self.requested - 1

    def get(self, number: int) -> Tensor:
        with self.arrived:
            came = self.arrived.wait_for(lambda: self.closed or number in self.messages, MEETING_TIMEOUT_S)
            if self.closed:
                raise threading.BrokenBarrierError
            if not came:
                raise TimeoutError(
                    f"a message between in-process ranks did not come within {MEETING_TIMEOUT_S} s"
                )
            return self.messages.pop(number)

    def close(self) -> None:
        with self.arrived:
            self.closed = True
            self.arrived.notify_all()


class ThreadComm:
    """Comm between threads of one process; made by ``run_in_process``."""

    def __init__(self, board: _Board, rank: int) -> None:
        self._board = board
        self.rank = rank
        self.size = board.size

    def all_to_all(
        self, chunks: Tensor, send: Sequence[int] | None = None, receive: Sequence[int] | None = None
    ) -> Tensor:
        """See Comm."""
        parts = [part.detach() for part in chunks.split(list(send or [1] * self.size))]
        received = self._meet(parts, lambda everyone: torch.cat([theirs[self.rank] for theirs in everyone]))
        assert receive is None or received.shape[0] == sum(receive), "ranks disagree about what is sent"
        return received

    def exchange(
        self, tensor: Tensor, *, to: int, source: int, shape: Sequence[int] | None = None
    ) -> Pending:
        """See Comm."""
        if tensor.numel():
            self._board.mail[self.rank][to].put(tensor.detach().clone())
        shape = tensor.shape if shape is None else torch.Size(shape)
        if not shape.numel():
            return Arrived(tensor.new_empty(shape))
        mail = self._board.mail[source][self.rank]
        return _ThreadPending(mail, mail.request(), shape)

    def all_sum(self, tensor: Tensor) -> Tensor:
        """See Comm."""
        # Added up in the order of ranks, so that every rank gets the same bits.
        return self._meet(tensor, lambda tensors: torch.stack(tensors).sum(0))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """See Comm."""
        return self._meet(tensor, torch.stack)

    def split(self, number: int) -> Comm:
        """See Comm."""
        numbers = self._meet(number, list)
        ranks = tuple(rank for rank, theirs in enumerate(numbers) if theirs == number)
        return ThreadComm(self._board.part(ranks), ranks.index(self.rank))

    def _meet(self, mine: Any, read: Callable[[list[Any]], Result]) -> Result:
        board = self._board
        board.slots[self.rank] = mine.detach() if isinstance(mine, Tensor) else mine
        board.wait()
        result = read(list(board.slots))
        board.wait()  # nobody posts the next thing before everyone has read this one
        return result


@dataclass(frozen=True)
class _ThreadPending:
    mail: _Mail
    number: int
    shape: torch.Size

    def wait(self) -> Tensor:
        tensor = self.mail.get(self.number)
        assert tensor.shape == self.shape, f"{tuple(tensor.shape)} came where {tuple(self.shape)} was due"
        return tensor


def run_in_process(size: int, function: Callable[[Comm], Result]) -> list[Result]:
    """Run ``function`` as ``size`` ranks in threads of this process; their results in the order of ranks.

    The first rank's error is raised here, and the others are woken instead of left waiting. Backward
    passes run in the ranks' own threads: autograd's shared device thread would deadlock.
    """
    board = _Board(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            with torch.autograd.set_multithreading_enabled(False):
                results[rank] = function(ThreadComm(board, rank))
        except threading.BrokenBarrierError:
            pass  # another rank failed first
        except BaseException as error:
            errors.append(error)
            board.abort()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank{rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
