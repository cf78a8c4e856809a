"""What a figure was measured on: processor, memory, load, versions, date."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

# What decides the rate of bf16 and fp32 matrix products, as /proc/cpuinfo calls it.
FEATURES = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "svebf16", "bf16")
PACKAGES = ("roformer-dist", "torch", "transformers", "deepspeed", "numpy")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory and the load at this moment."""
    return {
        "cpu": cpu_model(),
        "cpu_features": sorted(set(FEATURES) & set(_cpuinfo().split())),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "memory_available_bytes": psutil.virtual_memory().available,
        "load_average": load_average(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def usable_cores() -> int:
    """How many cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def load_average() -> list[float]:
    """Runnable processes over the last 1, 5 and 15 minutes."""
    return [round(load, 2) for load in psutil.getloadavg()]


def describe_versions() -> dict[str, str | None]:
    """Of Python and of every package that a figure depends on; None where one is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def now() -> str:
    """The date and time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def cpu_model() -> str:
    """The processor as it calls itself."""
    for line in _cpuinfo().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
