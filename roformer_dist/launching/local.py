"""Starting processes on this machine through the deepspeed launcher, and ending a run gently."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TextIO

TRAIN_MODULE = "roformer_dist.train"
COMMAND_MODULE = "roformer_dist.cli"
POLL_S = 0.2
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
GPU_DEVICES = ("/dev/nvidia0", "/dev/kfd")


def local_command(
    config: str, *, processes: int, overrides: Sequence[str], run_dir: str | None, port: int
) -> list[str]:
    """The launcher's command line for ``processes`` ranks of a run on this host."""
    arguments = ["--config", config]
    for override in overrides:
        arguments += ["--set", override]
    if run_dir:
        arguments += ["--run-dir", run_dir]
    return launcher_command(TRAIN_MODULE, arguments, processes=processes, port=port)


def launcher_command(module: str, arguments: Sequence[str], *, processes: int, port: int) -> list[str]:
    """The deepspeed launcher's command line for ``processes`` ranks of ``module`` on this host."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    # /dev/null is no file: a hostfile that happens to lie on this machine must not turn local into remote.
    command += ["--hostfile", os.devnull]
    command += ["--num_accelerators", str(processes), "--master_port", str(port), "--no_local_rank"]
    # Its warnings are that there is no hostfile and no GPU, which local means, and its error that a rank
    # failed, which the rank has said.
    return [*command, "--log_level", "critical", "--module", module, *arguments]


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_local(
    command: Sequence[str], *, output: TextIO | None = None, saves: bool = True
) -> tuple[int, bool]:
    """Run the launcher's command to its end; ``(exit code, whether it was interrupted)``.

    The launcher gets a session of its own, because on a terminal's Ctrl-C it would end the ranks while
    they save. Here the first SIGINT or SIGTERM asks the ranks alone to stop after their step; a second
    one ends everything. Where nothing is saved (``saves=False``), the first one does.
    """
    environment = dict(os.environ)
    # Fewer layers of buffering between a rank's line and the terminal.
    environment.setdefault("PYTHONUNBUFFERED", "1")
    if not any(os.path.exists(device) for device in GPU_DEVICES):
        # Otherwise each process of the launcher looks for one and warns that it found none.
        environment.setdefault("DS_ACCELERATOR", "cpu")
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=output)
    interrupts, told = 0, False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts == 1 and saves:
            print(
                "\nstopping after this step and saving; once more to end at once", file=sys.stderr, flush=True
            )
        elif process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            # The ranks may not have been started when the signal came, so they are looked for again.
            told = told or (saves and interrupts > 0 and stop_ranks(process.pid) > 0)
            try:
                return process.wait(timeout=POLL_S), interrupts > 0
            except subprocess.TimeoutExpired:
                continue
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop_ranks(launcher_pid: int) -> int:
    """SIGTERM to the training processes below ``launcher_pid``, not to the launcher itself; how many."""
    import psutil

    told = 0
    try:
        children = psutil.Process(launcher_pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return told
    for child in children:
        try:
            arguments = child.cmdline()
            if TRAIN_MODULE in arguments and "deepspeed.launcher.launch" not in arguments:
                child.send_signal(signal.SIGTERM)
                told += 1
        except psutil.NoSuchProcess:
            continue
    return told


def run_this_command(processes: int) -> int:
    """This very command line on ``processes`` ranks of this machine; the exit code.

    The ranks are given ``--processes`` too, and check it against what the launcher says.
    """
    command = launcher_command(COMMAND_MODULE, sys.argv[1:], processes=processes, port=free_port())
    code, interrupted = run_local(command, saves=False)
    if interrupted:
        return EXIT_INTERRUPTED
    return code if 0 <= code < 128 else EXIT_FAILED
