"""``bench startup``: how long until a command line answers."""

from __future__ import annotations

import sys
from pathlib import Path

from roformer_dist.bench.harness import Contender, Group, Metric

# Name and what installs it; both come with the package, but a partial installation may lack them.
PEERS = {"deepspeed": "deepspeed", "torchrun": "torch"}

METRICS = (
    Metric("seconds", "seconds", lambda s: s.seconds, lambda value: f"{value:.2f}"),
    Metric("peak_bytes", "peak MiB", lambda s: s.peak, lambda value: f"{value / 2**20:,.0f}"),
)


def startup_group() -> Group:
    """Our help and our import, a bare interpreter as the floor, and the help of the two launchers."""
    python = sys.executable
    ours = _program("roformer-dist")
    help_command = (str(ours), "--help") if ours.exists() else (python, "-m", "roformer_dist.cli", "--help")
    contenders = [
        Contender("roformer-dist --help", "ours", help_command),
        Contender("import roformer_dist.cli", "ours", (python, "-c", "import roformer_dist.cli")),
        Contender("python, nothing imported", "floor", (python, "-c", "pass")),
    ]
    for name, package in PEERS.items():
        program = _program(name)
        missing = None if program.exists() else f"{name}: not installed; pip install {package}"
        contenders.append(Contender(f"{name} --help", "peer", (str(program), "--help"), missing))
    return Group("startup", {"peers": list(PEERS)}, contenders)


def _program(name: str) -> Path:
    # Beside the interpreter, unresolved: in a virtual environment that is a link.
    return Path(sys.executable).parent / name
