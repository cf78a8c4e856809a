"""Figures and tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_bars(title: str, bars: Sequence[tuple[str, int, str]]) -> None:
    """``(label, value, note)`` a line; the longest bar is 36 characters wide."""
    largest = max((value for _, value, _ in bars), default=0)
    table = Table(title=Text(title), title_justify="left", box=None, show_header=False, padding=(0, 1))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(width=36)
    table.add_column(justify="right", no_wrap=True)
    for label, value, note in bars:
        table.add_row(Text(label), Bar(max(largest, 1), 0, value, color="cyan"), Text(f"{value:,}{note}"))
    Console().print(table)


def print_lengths(title: str, histogram: Sequence[dict[str, int]]) -> None:
    """A histogram of lengths by powers of two, with each octave's share of the tokens."""
    tokens = max(1, sum(octave["tokens"] for octave in histogram))
    bars = [
        (
            f"{o['from']:,} to {o['below'] - 1:,}",
            o["count"],
            f"  {100 * o['tokens'] / tokens:5.1f} %",
        )
        for o in histogram
    ]
    print_bars(f"{title}: how many, and their share of all tokens", bars)


def print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Rows of the same keys as a table with the keys as its heading."""
    table = Table(title=Text(title), title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{value:,}" for value in row.values()))
    Console().print(table)
