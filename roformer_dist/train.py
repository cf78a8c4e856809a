"""One rank of a run: ``python -m roformer_dist.train --config FILE``, started by any launcher.

``deepspeed --module``, ``torchrun -m`` and ``srun python -m`` all work: ranks come from the variables
that the launcher set, and without any this is the only process.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from roformer_dist.config import Config, RunShape, derive, load_config
from roformer_dist.engine.ranks import Ranks, end_process, read_ranks
from roformer_dist.engine.signals import StopFlag

EXIT_OK, EXIT_FAILED, EXIT_INPUT = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; 0 when the run finished or stopped on request, 1 when its preflight or an invariant of a step
    failed, 2 when it could not run."""
    options = _parse(arguments)
    stop = StopFlag()
    stop.install()  # before the slow imports, so that an early signal is not the end of one rank alone
    rank = 0
    try:
        ranks = read_ranks(os.environ)
        rank = ranks.rank
        config = load_config(options.config, options.set)
        shape = derive(config, ranks.world_size)
    except (ValueError, OSError) as error:
        # Every rank finds the same fault in the same file: one of them says it.
        return _fail(error) if rank == 0 else EXIT_INPUT
    return _run(config, shape, ranks, Path(options.run_dir or Path("runs") / config.name), stop)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="roformer_dist.train",
        description=__doc__,
        epilog="example: deepspeed --module roformer_dist.train --config configs/quickstart.toml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="TOML configuration")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override")
    parser.add_argument("--run-dir", help="directory of the run (default: runs/NAME)")
    # deepspeed adds it to the command line; LOCAL_RANK says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _run(config: Config, shape: RunShape, ranks: Ranks, run_dir: Path, stop: StopFlag) -> int:
    from roformer_dist.engine.agreement import PeerError
    from roformer_dist.engine.engine import start_process_group, stop_process_group
    from roformer_dist.engine.group import limit_threads, peer_is_gone
    from roformer_dist.engine.startup import build_trainer
    from roformer_dist.parallel.invariants import InvariantError
    from roformer_dist.parity.preflight import PreflightFailed, preflight

    limit_threads(ranks)
    try:
        device = start_process_group(ranks)
        build_trainer(config, shape, ranks, run_dir, device, stop, preflight).run()
        return EXIT_OK
    except PeerError:
        return EXIT_INPUT
    except (PreflightFailed, InvariantError) as error:
        # All ranks find it together.
        if ranks.rank == 0:
            _fail(error)
        return EXIT_FAILED
    except (ValueError, OSError, RuntimeError) as error:
        # A RuntimeError is the program's own, unless it is the network's.
        if isinstance(error, RuntimeError) and not peer_is_gone(error):
            raise
        return _fail(error, ranks.rank)
    finally:
        stop_process_group()


def _fail(error: Exception, rank: int | None = None) -> int:
    where = f"rank {rank}: " if rank else ""
    print(f"error: {where}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return EXIT_INPUT


if __name__ == "__main__":
    end_process(main())
