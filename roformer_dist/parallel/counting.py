"""A Comm that notes what it is asked to send: how cost is counted instead of timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from roformer_dist.parallel.comm import Comm, Pending


@dataclass(frozen=True)
class Message:
    """One message of one rank.

    Attributes:
        verb: the Comm's verb.
        bytes: what this rank puts into it.
        sent: the part of it that leaves the rank.
    """

    verb: str
    bytes: int
    sent: int


@dataclass
class CountingComm:
    """A Comm, and the groups split from it, that note every message in one list."""

    inner: Comm
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rank, self.size = self.inner.rank, self.inner.size

    def _note(self, verb: str, tensor: Tensor, kept: float) -> None:
        size = tensor.numel() * tensor.element_size()
        self.messages.append(Message(verb, size, round(size * (1 - kept))))

    def all_to_all(
        self, chunks: Tensor, send: Sequence[int] | None = None, receive: Sequence[int] | None = None
    ) -> Tensor:
        """See Comm."""
        counts = send or [1] * self.size
        self._note("all_to_all", chunks, counts[self.rank] / max(sum(counts), 1))
        return self.inner.all_to_all(chunks, send, receive)

    def exchange(
        self, tensor: Tensor, *, to: int, source: int, shape: Sequence[int] | None = None
    ) -> Pending:
        """See Comm."""
        self._note("exchange", tensor, float(to == self.rank))
        return self.inner.exchange(tensor, to=to, source=source, shape=shape)

    def all_sum(self, tensor: Tensor) -> Tensor:
        """See Comm."""
        self._note("all_sum", tensor, 0.0)
        return self.inner.all_sum(tensor)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """See Comm; a rank sends its part to each of the others."""
        self._note("all_gather", tensor, 2.0 - self.size)
        return self.inner.all_gather(tensor)

    def split(self, number: int) -> Comm:
        """See Comm."""
        return type(self)(self.inner.split(number), self.messages)
