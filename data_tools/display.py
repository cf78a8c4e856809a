"""Tables, progress bars and coloured text of the data commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
def byte_bar(total: int) -> Iterator[Callable[[str, int], None]]:
    """A progress bar with MB/s and the time left; it is called with a stage and the bytes done in it since
    its last call, and starts again at each new stage of ``total`` bytes."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        stages: dict[str, TaskID] = {}

        def advance(stage: str, size: int) -> None:
            if stage not in stages:
                for done in stages.values():
                    progress.update(done, visible=False)
                stages[stage] = progress.add_task(stage, total=total)
            progress.advance(stages[stage], size)

        yield advance


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
