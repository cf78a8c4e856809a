"""Failing together: what goes wrong on one rank ends all of them, and one of them says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from roformer_dist.parallel.comm import Comm

Value = TypeVar("Value")


class PeerError(RuntimeError):
    """Another rank failed and says why; this one only stops with it."""


def together(action: Callable[[], Value], world: Comm, device: torch.device) -> Value:
    """Run ``action``, which does not communicate, on every rank; if it fails on any, raise on all.

    The lowest rank that failed raises its own error, so that a fault that all ranks find in the same
    file is told once; the others raise PeerError.
    """
    failure: Exception | None = None
    value: Value | None = None
    try:
        value = action()
    except Exception as error:
        failure = error
    if int(world.all_sum(torch.tensor([int(failure is not None)], device=device))):
        raise_together(failure, world, device)
    return value  # pyright: ignore[reportReturnType] - no failure, so the action's own value


def raise_together(failure: BaseException | None, world: Comm, device: torch.device) -> None:
    """Called on all ranks once they know that some failed: every one raises."""
    failed = world.all_gather(torch.tensor(int(failure is not None), device=device))
    first = int(failed.argmax())
    if failure is not None and world.rank == first:
        raise failure
    raise PeerError(f"rank {first} failed")
