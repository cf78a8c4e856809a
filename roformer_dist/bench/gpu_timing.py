"""How ``bench gpu`` takes a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

DTYPE = torch.bfloat16


def median_seconds(work: Callable[[], Any], count: int, device: torch.device, warmups: int = 2) -> float:
    """The median of ``count`` runs after ``warmups`` that do not count."""
    times = []
    for _ in range(count + warmups):
        _synchronise(device)
        start = time.perf_counter()
        work()
        _synchronise(device)
        times.append(time.perf_counter() - start)
    return sorted(times[warmups:])[count // 2]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
