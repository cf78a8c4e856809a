"""Start one module as several ranks of a job on this machine and wait, as a launcher would. Standard library only.

Usage: python -m roformer_dist.bench.ranks PROCESSES MODULE [ARGUMENT …]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from roformer_dist.engine.ranks import free_port


def main(processes: int, command: list[str]) -> int:
    """0, or the exit code of the first rank that failed; the others are ended then."""
    place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]
    try:
        while any(rank.poll() is None for rank in ranks):
            if failed := [rank.returncode for rank in ranks if rank.returncode]:
                return failed[0]
            time.sleep(0.02)
        return next((rank.returncode for rank in ranks if rank.returncode), 0)
    finally:
        for rank in ranks:
            rank.kill()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
