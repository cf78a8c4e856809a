"""Start one command, wait, and print its seconds and its peak memory as JSON. Run by path, standard library only.

A process inherits the peak memory of the one that forked it (Linux keeps the larger of the two in
``ru_maxrss``). Between the harness and what it measures therefore stands this script, in a bare
interpreter of some 10 MiB, below anything that is worth measuring.

Usage: python -I -S spawner.py MEMORY_LIMIT STDOUT STDERR COMMAND [ARGUMENT …]
"""

import json
import os
import resource
import sys
import time


def main(memory_limit: int, stdout: str, stderr: str, command: list[str]) -> None:
    """Run ``command`` with at most ``memory_limit`` bytes of data (0: no limit) and report on standard output."""
    if memory_limit:
        # Above it an allocation fails and names itself; without it the kernel picks a process to end.
        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit, resource.RLIM_INFINITY))
    write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, stdout, write, 0o600),
        (os.POSIX_SPAWN_OPEN, 2, stderr, write, 0o600),
    ]
    start = time.perf_counter()
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - start
    # Linux counts in KiB, macOS in bytes.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "peak": peak, "code": os.waitstatus_to_exitcode(status)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
