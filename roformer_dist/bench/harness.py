"""Contenders in turn, each sample in a process of its own; medians, spread, and ratios pair by pair.

Machines drift: another job starts, a clock changes. So nobody runs all their samples at a stretch. In
every round each contender takes one (A B C, A B C, …), and a ratio compares samples of one round only.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SPAWNER = Path(__file__).with_name("spawner.py")


def check_choice(option: str, chosen: Iterable[str], known: Collection[str]) -> None:
    """Raise ``ValueError`` naming the first of ``chosen`` that is not ``known``, and what is."""
    for name in chosen:
        if name not in known:
            raise ValueError(f"{option} {name!r}: choose from {', '.join(known)}")


@dataclass(frozen=True)
class Contender:
    """Something to measure.

    Attributes:
        name: as in the table.
        role: the first of ``ours`` in a group is what peers are compared with; a ``floor`` is for orientation.
        command: what a sample runs; its program is a path.
        missing: why it cannot run here and how to install it; None when it can.
        reports: whether the last line of its standard output is a JSON object of further figures.
    """

    name: str
    role: Literal["ours", "peer", "floor"]
    command: tuple[str, ...]
    missing: str | None = None
    reports: bool = False


@dataclass(frozen=True)
class Sample:
    """One process: its wall-clock seconds, its peak resident bytes, and what it said about itself."""

    seconds: float
    peak: int
    reported: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A figure of a sample.

    Attributes:
        key: its name in the JSON.
        label: its name in the table.
        value: how to read it from a sample.
        show: how to print it.
    """

    key: str
    label: str
    value: Callable[[Sample], float]
    show: Callable[[float], str]


@dataclass
class Measured:
    """A contender with its samples, one a round until it failed; ``failure`` is one line, or None."""

    contender: Contender
    samples: list[Sample] = field(default_factory=list)
    failure: str | None = None


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some figures."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """The spread of ``values``; None when there are none."""
        return cls(statistics.median(values), min(values), max(values)) if values else None


@dataclass(frozen=True)
class Limits:
    """What a sample may take: seconds, and bytes of data (0: any)."""

    timeout: float = 1800.0
    memory: int = 0


@dataclass(frozen=True)
class Group:
    """Contenders that do the same work.

    Attributes:
        title: what the work is.
        parameters: the same, for a program.
        contenders: in the order in which they take turns.
        check: whether a sample of another contender, floors aside, did the same work as the first of ours; a
            complaint in one line, or None.
    """

    title: str
    parameters: Mapping[str, Any]
    contenders: Sequence[Contender]
    check: Callable[[Sample, Sample], str | None] = lambda ours, other: None


def run_sample(contender: Contender, limits: Limits, environment: Mapping[str, str]) -> Sample | str:
    """One sample of a contender, or in one line why there is none."""
    with tempfile.TemporaryDirectory() as directory:
        stdout, stderr = Path(directory) / "stdout", Path(directory) / "stderr"
        spawner = [sys.executable, "-I", "-S", str(SPAWNER)]
        process = subprocess.Popen(
            [*spawner, str(limits.memory), str(stdout), str(stderr), *contender.command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            # A group of its own, so that all of it can be ended.
            start_new_session=True,
        )
        try:
            answer, complaint = process.communicate(timeout=limits.timeout)
        except subprocess.TimeoutExpired:
            last = _last_line(_text(stdout))
            return f"ended after {limits.timeout:g} s (--timeout)" + (
                f"; its last line: {last}" if last else ""
            )
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode:
            return f"could not be started: {_last_line(complaint)}"
        measured = json.loads(answer)
        if measured["code"]:
            return _explain(measured["code"], _text(stderr) or _text(stdout))
        try:
            reported = json.loads(_last_line(_text(stdout))) if contender.reports else {}
        except json.JSONDecodeError:
            return f"its last line is no JSON: {_last_line(_text(stdout))!r}"
        return Sample(measured["seconds"], measured["peak"], reported)


def run_group(
    group: Group,
    *,
    rounds: int,
    warmups: int,
    limits: Limits,
    environment: Mapping[str, str],
    advance: Callable[[str], None] = lambda name: None,
) -> list[Measured]:
    """All contenders of a group in turn; who failed or is missing sits out the rest.

    Args:
        rounds: samples of each that count.
        warmups: rounds before that do not (disk caches, byte code).
        environment: variables for every sample, besides those of this process.
        advance: called once for every turn, before it is taken, with the contender's name.
    """
    measured = [Measured(contender) for contender in group.contenders]
    reference = next((m for m in measured if m.contender.role == "ours"), None)
    for turn in range(warmups + rounds):
        for entry in measured:
            advance(entry.contender.name)
            if entry.contender.missing or entry.failure:
                continue
            sample = run_sample(entry.contender, limits, environment)
            if isinstance(sample, str):
                entry.failure = sample
            elif turn >= warmups:
                entry.samples.append(sample)
                checked = entry is not reference and entry.contender.role != "floor"
                if checked and reference and reference.samples:
                    entry.failure = group.check(reference.samples[-1], sample)
    return measured


def ratios(ours: Measured, other: Measured, metric: Metric) -> list[float]:
    """Ours over the other, round by round; none for one that failed."""
    if ours.failure or other.failure:
        return []
    return [metric.value(a) / metric.value(b) for a, b in zip(ours.samples, other.samples)]


def _explain(code: int, output: str) -> str:
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{how}: {line}" if (line := _last_line(output)) else how


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
