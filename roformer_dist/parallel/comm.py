"""Comm: the few verbs that parallel code may use, and torch.distributed's form of them (in_process.py: threads)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor


class Pending(Protocol):
    """A message under way."""

    def wait(self) -> Tensor:
        """The received tensor; only now may the sent one be written again."""
        ...


class Comm(Protocol):
    """Communication of one rank inside one group; every rank of the group calls the same verb in turn."""

    rank: int
    size: int

    def all_to_all(
        self, chunks: Tensor, send: Sequence[int] | None = None, receive: Sequence[int] | None = None
    ) -> Tensor:
        """``[X, ...]`` to ``[Y, ...]``: chunk j goes to rank j, chunk i of the result came from rank i.

        ``send[j]`` rows of ``chunks`` make chunk j, ``receive[i]`` rows come from rank i; by default one each.
        """
        ...

    def exchange(
        self, tensor: Tensor, *, to: int, source: int, shape: Sequence[int] | None = None
    ) -> Pending:
        """Send ``tensor`` to rank ``to`` and receive one of the same dtype from ``source``.

        What comes has the given ``shape`` (default: that of ``tensor``). A tensor without elements is
        not sent. Between two ranks, messages arrive in the order in which they were posted.
        """
        ...

    def split(self, number: int) -> Comm:
        """The ranks of this group that give the same number, in the order of their ranks."""
        ...

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum over the group, the same on every rank."""
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """``[...]`` to ``[P, ...]``, in the order of ranks."""
        ...


class SoloComm:
    """A group of one: nothing travels."""

    rank, size = 0, 1

    def all_to_all(
        self, chunks: Tensor, send: Sequence[int] | None = None, receive: Sequence[int] | None = None
    ) -> Tensor:
        """See Comm."""
        return chunks

    def exchange(
        self, tensor: Tensor, *, to: int, source: int, shape: Sequence[int] | None = None
    ) -> Pending:
        """See Comm."""
        return Arrived(tensor.clone())

    def all_sum(self, tensor: Tensor) -> Tensor:
        """See Comm."""
        return tensor.clone()

    def all_gather(self, tensor: Tensor) -> Tensor:
        """See Comm."""
        return tensor[None].clone()

    def split(self, number: int) -> Comm:
        """See Comm."""
        return self


@dataclass(frozen=True)
class Arrived:
    """A message that needs no waiting."""

    tensor: Tensor

    def wait(self) -> Tensor:
        """See Pending."""
        return self.tensor


class GroupComm:
    """Comm over a torch.distributed process group (None: all processes)."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def all_to_all(
        self, chunks: Tensor, send: Sequence[int] | None = None, receive: Sequence[int] | None = None
    ) -> Tensor:
        """See Comm."""
        send, receive = list(send or [1] * self.size), list(receive or [1] * self.size)
        received = chunks.new_empty((sum(receive), *chunks.shape[1:]))
        dist.all_to_all_single(received, chunks.contiguous(), receive, send, group=self.group)
        return received

    def exchange(
        self, tensor: Tensor, *, to: int, source: int, shape: Sequence[int] | None = None
    ) -> Pending:
        """See Comm."""
        sent = tensor.contiguous()
        received = sent.new_empty(tensor.shape if shape is None else tuple(shape))
        operations = []
        if sent.numel():
            operations.append(dist.P2POp(dist.isend, sent, group=self.group, group_peer=to))
        if received.numel():
            operations.append(dist.P2POp(dist.irecv, received, group=self.group, group_peer=source))
        requests = dist.batch_isend_irecv(operations) if operations else []
        return _GroupPending(requests, received, sent)

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

    def split(self, number: int) -> Comm:
        """See Comm; every process of the job takes part, so only the group of all processes can be split."""
        assert self.group is None, "a group of torch.distributed is made by all processes"
        numbers: list[Any] = [None] * self.size
        dist.all_gather_object(numbers, number)
        own: Comm = SoloComm()
        # Every process takes part in the making of every group, in the same order.
        for each in sorted(set(numbers)):
            ranks = [rank for rank, theirs in enumerate(numbers) if theirs == each]
            if len(ranks) == 1:
                continue
            group = GroupComm() if len(ranks) == self.size else _new_group(ranks)
            own = group if each == number and group else own
        return own


def _new_group(ranks: list[int]) -> GroupComm | None:
    group = dist.new_group(ranks)
    return GroupComm(group) if isinstance(group, dist.ProcessGroup) else None


@dataclass(frozen=True)
class _GroupPending:
    requests: list[Any]
    received: Tensor
    sent: Tensor  # held until the request is done, so that its memory is not given to another tensor

    def wait(self) -> Tensor:
        for request in self.requests:
            request.wait()
        return self.received
