"""A run's directory: complete in itself, and of one configuration."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import socket
import sys
import tomllib
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Literal

from roformer_dist.config import Config, dump_config, parse_config
from roformer_dist.data.files import atomic_file

STATUS, LOCK = "status.json", "lock"
# What may differ when a run goes on: how it is spread, watched and saved, not what is computed.
SPREAD = ("parallel", "checkpoint", "validation", "logging")
SPREAD_KEYS = {
    "train": ("micro_batch_size", "kernel"),
    "data": ("workers", "on_corrupt", "cache_dir", "cache_gb"),
}


def claim_run_dir(run_dir: Path, config: Config) -> IO[str]:
    """Make ``run_dir`` the directory of ``config``, or find that it already is, and lock it.

    Returns:
        The open lock file; the directory is free again when it is closed or the process ends.

    Raises:
        ValueError: it belongs to a run that computes something else (the first differing key is named), or
            another process trains in it.
    """
    recorded = run_dir / "config.toml"
    if recorded.exists():
        try:
            values = tomllib.loads(recorded.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{recorded}: damaged ({error}); choose another --run-dir") from None
        _check_same_run(run_dir, parse_config(values, source=str(recorded)), config)
    elif run_dir.exists() and any(not _is_leftover(entry) for entry in run_dir.iterdir()):
        if (run_dir / "checkpoints").is_dir():
            raise ValueError(
                f"{recorded}: missing beside checkpoints; put it back or choose another --run-dir"
            )
        raise ValueError(f"{run_dir}: not empty and not a run's directory; choose another --run-dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = _lock(run_dir)
    _write(recorded, dump_config(config))
    return lock


def _is_leftover(entry: Path) -> bool:
    """What a start that was killed before it wrote config.toml may leave."""
    return entry.name == LOCK or entry.suffix == ".partial"


def _lock(run_dir: Path) -> IO[str]:
    """Two runs in one directory would remove each other's unfinished checkpoints."""
    lock = (run_dir / LOCK).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise ValueError(
            f"{run_dir}: {holder} trains in it; wait for it or choose another --run-dir"
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def _check_same_run(run_dir: Path, recorded: Config, config: Config) -> None:
    old, new = _identity(recorded), _identity(config)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise ValueError(
                f"{run_dir}: holds a run with {key} = {old.get(key)!r}, this configuration has "
                f"{new.get(key)!r}; choose another --run-dir or name, or go back to the old value"
            )


def _identity(config: Config) -> dict[str, Any]:
    """What decides the numbers of the run, as flat ``section.key`` entries."""
    sections = config.model_dump(mode="json", exclude=set(SPREAD))
    flat: dict[str, Any] = {}
    for section, values in sections.items():
        if not isinstance(values, dict):
            flat[section] = values
            continue
        skipped = SPREAD_KEYS.get(section, ())
        flat |= {f"{section}.{key}": value for key, value in values.items() if key not in skipped}
    flat["checkpoint.init_from"] = config.checkpoint.init_from
    return flat


def write_environment(run_dir: Path, facts: dict[str, Any]) -> None:
    """Append what this start ran on to environment.json: one entry for every start of the run."""
    path = run_dir / "environment.json"
    starts = _read_json(path) or []
    packages = ("torch", "deepspeed", "numpy", "sentencepiece", "webdataset", "roformer-dist")
    starts.append(
        {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "python": sys.version.split()[0],
            "cores": len(os.sched_getaffinity(0)),
            "packages": {name: version(name) for name in packages},
            **facts,
        }
    )
    _write(path, json.dumps(starts, indent=2) + "\n")


def write_status(run_dir: Path, state: Literal["running", "stopped", "finished"], step: int) -> None:
    """Record how far the run is; a launcher's exit code alone does not say that it finished."""
    _write(run_dir / STATUS, json.dumps({"state": state, "step": step}) + "\n")


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """What ``write_status`` last wrote, None for a run that never started."""
    return _read_json(run_dir / STATUS)


def _read_json(path: Path) -> Any:
    """The content of a file that only informs; None when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())
