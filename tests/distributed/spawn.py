"""Run a function on real gloo processes and get its results, or its exception, back."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from roformer_dist.engine.ranks import end_process

TIMEOUT_S = 120.0


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S
) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` on ``world_size`` processes and return the results by rank.

    ``function`` must be importable (top level of a module); arguments and results must pickle. The
    processes share a gloo group with DeepSpeed initialised on it, one thread each.

    Raises:
        AssertionError: the first rank's exception, with its traceback as text.
        TimeoutError: not all ranks finished within ``timeout_s`` seconds.
    """
    context = mp.get_context("spawn")
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        pipes: dict[Connection, int] = {}
        processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            call = (rank, world_size, Path(directory) / "store", theirs, function, args)
            processes.append(context.Process(target=_run_rank, args=call, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes[ours] = rank
        try:
            while pipes:
                ready = wait(list(pipes), timeout=timeout_s)
                if not ready:
                    raise TimeoutError(f"ranks {sorted(pipes.values())} not finished after {timeout_s} s")
                for pipe in ready:
                    rank = pipes.pop(pipe)  # pyright: ignore[reportArgumentType]
                    results[rank] = _receive(rank, pipe)  # pyright: ignore[reportArgumentType]
            for process in processes:
                process.join(timeout_s)
                assert process.exitcode == 0, f"a rank ended with exit code {process.exitcode}"
        finally:
            for process in processes:
                process.kill()
    return [results[rank] for rank in range(world_size)]


def _send(pipe: Connection, status: str, value: Any) -> None:
    # Plain pickle copies tensors; Connection.send would share their memory with a process about to end.
    pipe.send_bytes(pickle.dumps((status, value)))


def _receive(rank: int, pipe: Connection) -> Any:
    try:
        status, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise AssertionError(f"rank {rank} died without a result") from None
    if status == "error":
        raise AssertionError(f"rank {rank} raised:\n{value}")
    return value


def _run_rank(
    rank: int, world_size: int, store: Path, pipe: Connection, function: Callable[..., Any], args: tuple
) -> None:
    os.environ.update(
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
        DEEPSPEED_LOG_LEVEL="error",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
    )
    import logging

    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    import deepspeed
    import torch.distributed as dist

    # A compiled fast path for CPU collectives: a minute of compiling, and not what is tested.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pyright: ignore
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        result = function(rank, world_size, *args)
        dist.barrier()
        _send(pipe, "result", result)
    except BaseException:
        _send(pipe, "error", traceback.format_exc())
    finally:
        dist.destroy_process_group()
    end_process(0)
