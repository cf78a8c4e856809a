"""Comm: the few verbs that parallel code may use, over torch.distributed or between ranks of one process.

The in-process form runs P ranks as P threads that meet at a barrier. It carries tests, parity checks
at sizes no laptop could spawn, and studies on one GPU (NCCL refuses several ranks on a device).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")
# Longer than any honest difference between the ranks' work between two calls.
MEETING_TIMEOUT_S = 300


class Pending(Protocol):
    """A message under way."""

    def wait(self) -> Tensor:
        """The received tensor; only now may the sent one be written again."""
        ...


class Comm(Protocol):
    """Communication of one rank inside one group; every rank of the group calls the same verb in turn."""

    rank: int
    size: int

    def all_to_all(self, chunks: Tensor) -> Tensor:
        """``[P, ...]`` to ``[P, ...]``: chunk j goes to rank j, chunk i of the result came from rank i."""
        ...

    def exchange(self, tensor: Tensor, *, to: int, source: int) -> Pending:
        """Send ``tensor`` to rank ``to`` and receive one of the same shape and dtype from ``source``."""
        ...

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum over the group, the same on every rank."""
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """``[...]`` to ``[P, ...]``, in the order of ranks."""
        ...


class GroupComm:
    """Comm over a torch.distributed process group (None: all processes)."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def all_to_all(self, chunks: Tensor) -> Tensor:
        """See Comm."""
        received = torch.empty_like(chunks, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, chunks.contiguous(), group=self.group)
        return received

    def exchange(self, tensor: Tensor, *, to: int, source: int) -> Pending:
        """See Comm."""
        sent = tensor.contiguous()
        received = torch.empty_like(sent)
        operations = [
            dist.P2POp(dist.isend, sent, group=self.group, group_peer=to),
            dist.P2POp(dist.irecv, received, group=self.group, group_peer=source),
        ]
        return _GroupPending(dist.batch_isend_irecv(operations), received, sent)

    def all_sum(self, tensor: Tensor) -> Tensor:
        """See Comm."""
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def all_gather(self, tensor: Tensor) -> Tensor:
        """See Comm."""
        gathered = tensor.new_empty((self.size, *tensor.shape))
        dist.all_gather(list(gathered.unbind(0)), tensor.contiguous(), group=self.group)
        return gathered


@dataclass(frozen=True)
class _GroupPending:
    requests: list[Any]
    received: Tensor
    sent: Tensor  # held until the request is done, so that its memory is not given to another tensor

    def wait(self) -> Tensor:
        for request in self.requests:
            request.wait()
        return self.received


class _Board:
    """Where the threads of one in-process group leave tensors for each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: list[Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size)
        self.mail = [[queue.SimpleQueue() for _ in range(size)] for _ in range(size)]
        self.aborted = False

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
                box.put(None)


class ThreadComm:
    """Comm between threads of one process; made by ``run_in_process``."""

    def __init__(self, board: _Board, rank: int) -> None:
        self._board = board
        self.rank = rank
        self.size = board.size

    def all_to_all(self, chunks: Tensor) -> Tensor:
        """See Comm."""
        return self._meet(chunks, lambda all_chunks: torch.stack([c[self.rank] for c in all_chunks]))

    def exchange(self, tensor: Tensor, *, to: int, source: int) -> Pending:
        """See Comm."""
        self._board.mail[self.rank][to].put(tensor.detach().clone())
        return _ThreadPending(self._board.mail[source][self.rank])

    def all_sum(self, tensor: Tensor) -> Tensor:
        """See Comm."""
        # Added up in the order of ranks, so that every rank gets the same bits.
        return self._meet(tensor, lambda tensors: torch.stack(tensors).sum(0))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """See Comm."""
        return self._meet(tensor, torch.stack)

    def _meet(self, tensor: Tensor, read: Callable[[list[Tensor]], Tensor]) -> Tensor:
        board = self._board
        board.slots[self.rank] = tensor.detach()
        board.wait()
        result = read([slot for slot in board.slots if slot is not None])
        board.wait()  # nobody posts the next tensor before everyone has read this one
        return result


@dataclass(frozen=True)
class _ThreadPending:
    box: queue.SimpleQueue[Tensor | None]

    def wait(self) -> Tensor:
        tensor = self.box.get()
        if tensor is None:
            raise threading.BrokenBarrierError
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
