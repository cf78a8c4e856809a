"""Tables, progress bars and coloured text of the data commands."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]

_COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")
_LINE_SECONDS = 15
_NO_SIZES = "sizes are not known, so neither is the time left"
_SHOWN = 400  # characters of a piece that are printed at each of its ends


class Advance(Protocol):
    """Called with the number of items done since the last call."""

    def __call__(self, items: int = 1, /) -> None: ...


@contextmanager
def progress_bar(label: str, total: int | None) -> Iterator[Advance]:
    """A progress bar on standard error, when that is a terminal; ``total`` None is unknown."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        yield lambda items=1: progress.advance(task, items)


@contextmanager
def byte_bar(total: int | None) -> Iterator[Callable[[str, int | None], None]]:
    """How far it is, on standard error: a bar with MB/s and the time left on a terminal, else a line now and then.

    It is called with a stage and the bytes done in it since its last call, and starts again at each new stage
    of ``total`` bytes (None: not known). A stage that counts no bytes is told once, with None.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        stages: dict[str, TaskID] = {}

        def advance(stage: str, size: int | None) -> None:
            if stage not in stages:
                for done in stages.values():
                    progress.update(done, visible=False)
                counted = total if size is not None else None
                note = f" ({_NO_SIZES})" if size is not None and total is None else ""
                stages[stage] = progress.add_task(stage + note, total=counted)
                progress.refresh()  # what comes next may hold Python's lock for long
            progress.advance(stages[stage], size or 0)

        yield advance


class _Lines:
    """Prints a line when a stage begins that counts no bytes, and every quarter of a minute in the others."""

    def __init__(self, total: int | None) -> None:
        self._total, self._stage = total, ""
        self._done = self._before = 0
        self._started = self._printed = time.monotonic()

    def __call__(self, stage: str, size: int | None) -> None:
        if size is None:
            print(f"{stage} …", file=sys.stderr, flush=True)
            return
        now = time.monotonic()
        if stage != self._stage:
            # What a stage begins with was done by a run before this one.
            self._stage, self._done, self._before, self._started = stage, 0, size, now
        self._done += size
        if now - self._printed >= _LINE_SECONDS:
            self._printed = now
            print(self._line(now), file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        speed = (self._done - self._before) / max(now - self._started, 1e-9)
        if not self._total:
            return f"{self._stage}: {self._done / 1e6:,.1f} MB, {speed / 1e6:.1f} MB/s ({_NO_SIZES})"
        left = max(0, self._total - self._done) / max(speed, 1)
        return (
            f"{self._stage}: {self._done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB "
            f"({100 * self._done / self._total:.1f} %), {speed / 1e6:.1f} MB/s, {timedelta(seconds=round(left))} left"
        )


def report(title: str, values: dict[str, Any], *, as_json: bool) -> None:
    """Print ``values`` as one JSON object, or as a closing table."""
    if as_json:
        print(json.dumps(values, sort_keys=True))
        return
    table = Table(title=Text(title), show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in values.items():
        if not isinstance(value, dict):
            table.add_row(name.replace("_", " "), Text(_number(value)))
            continue
        # A histogram or counts by reason: a line each.
        width = max((len(str(key)) for key in value), default=0)
        lines = [f"{key!s:{width}}  {_number(count)}" for key, count in value.items()]
        table.add_row(name.replace("_", " "), Text("\n".join(lines) or "0"))
    Console().print(table)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def print_pieces(pieces: Sequence[tuple[str, str]]) -> None:
    """Print ``(heading, text)`` pieces one after the other, each in a colour of its own."""
    console = Console()
    for number, (heading, text) in enumerate(pieces):
        colour = _COLOURS[number % len(_COLOURS)]
        console.rule(Text(heading, style=f"bold {colour}"), align="left", style=colour)
        if len(text) > 2 * _SHOWN:
            text = f"{text[:_SHOWN]}\n… {len(text) - 2 * _SHOWN:,} more characters …\n{text[-_SHOWN:]}"
        console.print(Text(text, style=colour))
