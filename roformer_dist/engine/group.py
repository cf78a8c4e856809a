"""The processes of a command that reads a checkpoint and is done: one alone, or those that a launcher started."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from roformer_dist.engine.agreement import PeerError
from roformer_dist.engine.engine import start_process_group, stop_process_group
from roformer_dist.engine.ranks import Ranks, read_ranks
from roformer_dist.parallel.comm import Comm, GroupComm, SoloComm

EXIT_INPUT = 2


@dataclass(frozen=True)
class Group:
    """All processes of the command, and this one's device."""

    world: Comm
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.world.rank == 0


@contextmanager
def joined_group(processes: int | None) -> Iterator[Group]:
    """Join the processes that a launcher started; without one, be alone on the CPU.

    A fault that another rank tells ends this one without a word, with the exit code of bad input.

    Args:
        processes: how many the user asked for, if he did.

    Raises:
        ValueError: there are not as many, or the launcher's variables are incomplete.
        OSError: the processes cannot meet, or one of them is gone.
    """
    ranks = read_ranks(os.environ)
    if processes not in (None, ranks.world_size):
        raise ValueError(
            f"--processes {processes}, and the launcher started {ranks.world_size}; leave the option to the launcher"
        )
    if ranks.launcher == "none":
        yield Group(SoloComm(), torch.device("cpu"))
        return
    limit_threads(ranks)
    try:
        device = start_process_group(ranks)
        yield Group(GroupComm(), device)
    except PeerError:
        sys.exit(EXIT_INPUT)
    except RuntimeError as error:
        if not peer_is_gone(error):
            raise
        raise OSError(f"rank {ranks.rank}: another process is gone: {error}") from None
    finally:
        stop_process_group()


def limit_threads(ranks: Ranks) -> None:
    """Share this host's cores between its ranks, unless OMP_NUM_THREADS already says how many."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    torch.set_num_threads(max(1, ranks.cores or len(os.sched_getaffinity(0)) // ranks.local_size))


def peer_is_gone(error: Exception) -> bool:
    """Whether an error of the program is the network's: a peer has left."""
    return any(word in str(error) for word in ("Connection closed by peer", "Connection reset"))
