"""Starting all ranks on this machine, ending them gently, and what is said about the outcome."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from roformer_dist.engine.run_dir import write_status
from roformer_dist.engine.signals import StopFlag
from roformer_dist.launching.local import local_command
from roformer_dist.launching.outcome import report_outcome


def test_the_command_starts_the_training_module_on_this_host_only() -> None:
    command = local_command(
        "my run.toml", processes=3, overrides=["a.b=1", 'c.d={x = "y z"}'], run_dir="out dir", port=1234
    )
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    launcher, ranks = command[: command.index("--module")], command[command.index("--module") :]
    for option, value in (("--hostfile", os.devnull), ("--num_accelerators", "3"), ("--master_port", "1234")):
        assert launcher[launcher.index(option) + 1] == value
    # One argument stays one argument, whatever is in it.
    assert ranks == [
        *("--module", "roformer_dist.train", "--config", "my run.toml"),
        *("--set", "a.b=1", "--set", 'c.d={x = "y z"}', "--run-dir", "out dir"),
    ]


def test_without_overrides_and_run_dir_nothing_is_passed_on() -> None:
    command = local_command("c.toml", processes=1, overrides=[], run_dir=None, port=1)
    assert command[-2:] == ["--config", "c.toml"]


@pytest.mark.parametrize(
    ("state", "code", "interrupted", "exit_code", "says"),
    [
        ("finished", 0, False, 0, ""),
        ("stopped", 0, True, 130, ""),
        # A scheduler's signal reaches the ranks without the launch command knowing.
        ("stopped", 0, False, 130, ""),
        # It had finished before the signal came.
        ("finished", 0, True, 0, ""),
        ("running", 0, False, 1, "does not say finished"),
        (None, 0, False, 1, "does not say finished"),
        ("running", 2, False, 2, ""),
        (None, 2, False, 2, ""),
        ("running", 1, False, 1, ""),
        ("running", -9, False, 1, ""),
        ("running", 137, False, 1, ""),
        ("running", -9, True, 130, "ended before it could save"),
        ("running", 1, True, 130, "ended before it could save"),
    ],
)
def test_the_run_s_own_word_counts_not_the_launcher_s(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    state: str | None,
    code: int,
    interrupted: bool,
    exit_code: int,
    says: str,
) -> None:
    if state:
        write_status(tmp_path, state, 5)
    assert report_outcome(tmp_path, code, interrupted=interrupted) == exit_code
    said = capfd.readouterr().err
    assert says in said
    assert bool(said) == bool(says)


# A launcher like deepspeed's: it starts one rank, waits for it, and dies at once on a signal of its own.
RANK = """
import signal, sys, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
open(sys.argv[2], "w").write("ready")
end = time.time() + 20
while not stop and time.time() < end: time.sleep(0.01)
{after}
open(sys.argv[2], "w").write("saved")
"""
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
LAUNCH = "import sys; from roformer_dist.launching.local import run_local; print(run_local(sys.argv[1:]))"


def start(note: Path, after: str = "") -> subprocess.Popen[str]:
    rank = [sys.executable, "-c", RANK.format(after=after), "roformer_dist.train", str(note)]
    command = [sys.executable, "-c", LAUNCH, sys.executable, "-c", LAUNCHER, *rank]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(note, "ready")
    return process


def wait_for(note: Path, word: str) -> None:
    end = time.monotonic() + 20
    while not note.exists() or note.read_text() != word:
        assert time.monotonic() < end, f"{note} never says {word}"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_the_first_signal_lets_the_ranks_save(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path / "note")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert out.strip() == "(0, True)"
    assert "stopping after this step and saving" in err
    assert (tmp_path / "note").read_text() == "saved"


def test_the_second_signal_ends_everything(tmp_path: Path) -> None:
    note = tmp_path / "note"
    process = start(note, after="open(sys.argv[2], 'w').write('saving'); time.sleep(20)")
    process.send_signal(signal.SIGINT)
    wait_for(note, "saving")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert out.strip() == "(-9, True)"
    assert note.read_text() == "saving"


def test_a_launcher_that_fails_hands_its_code_on() -> None:
    command = [sys.executable, "-c", LAUNCH, sys.executable, "-c", "raise SystemExit(7)"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "(7, False)"


# SIGUSR1 is what schedulers send ahead of a time limit.
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_rank_notes_a_signal_and_goes_on(number: signal.Signals) -> None:
    previous = {n: signal.getsignal(n) for n in StopFlag.SIGNALS}
    try:
        stop = StopFlag()
        stop.install()
        assert stop.requested is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.requested == number.name
    finally:
        for n, handler in previous.items():
            signal.signal(n, handler)
