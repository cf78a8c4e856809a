"""What became of a launched run: its own word counts, not the launcher's exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130


def report_outcome(run_dir: Path, code: int, *, interrupted: bool) -> int:
    """The exit code of a launch, with a line where it is not plain success.

    Launchers report success for runs that a signal ended, so success needs ``finished`` in the run's
    status file.
    """
    status_file = run_dir / "status.json"
    try:
        status = json.loads(status_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        status = {"state": "absent"}
    if status["state"] == "finished" and not code:
        return EXIT_OK
    if status["state"] == "stopped" and (interrupted or not code):
        return EXIT_INTERRUPTED
    if code:
        if interrupted:
            print(
                f"ended before it could save; the same command goes on from {run_dir}'s last checkpoint",
                file=sys.stderr,
            )
            return EXIT_INTERRUPTED
        return code if 0 < code < 128 else EXIT_FAILED
    print(
        f"error: the launcher ended without an error, but {status_file} does not say finished",
        file=sys.stderr,
    )
    return EXIT_FAILED
