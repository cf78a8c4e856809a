"""Whether this device computes in bf16, and what the configuration makes of it."""

from __future__ import annotations

from pathlib import Path

import torch

from roformer_dist.engine.deepspeed_config import Precision

# /proc/cpuinfo names of bf16 matrix or dot-product instructions: x86 "flags", Arm "Features".
CPU_BF16_UNITS = ("amx_bf16", "avx512_bf16", "svebf16", "bf16")


def has_bf16_units(device: torch.device) -> tuple[bool, str]:
    """Whether ``device`` has bf16 arithmetic, and the finding in words."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        found = torch.cuda.is_bf16_supported(including_emulation=False)
        return found, f"{name} {'has' if found else 'has no'} bf16 units"
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False, "this CPU's instruction set cannot be read (/proc/cpuinfo)"
    units = [unit for unit in CPU_BF16_UNITS if unit in words]
    if units:
        return True, f"this CPU has bf16 units ({', '.join(units)})"
    return False, f"this CPU has no bf16 units ({', '.join(CPU_BF16_UNITS)})"


def choose_precision(wanted: str, *, everywhere: bool, finding: str) -> tuple[Precision, str]:
    """The precision of the run and the reason.

    Args:
        wanted: ``train.precision``.
        everywhere: whether every process of the run has bf16 units.
        finding: what was found on this one.
    """
    if wanted == "auto":
        if everywhere:
            return "bf16", f"bf16 with fp32 master weights: {finding}"
        return "fp32", f"fp32: {finding}, or another process's device has none"
    if wanted == "bf16":
        return "bf16", f"bf16 with fp32 master weights: asked for; {finding}"
    return "fp32", "fp32: asked for"
