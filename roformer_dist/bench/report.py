"""Measured groups as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from roformer_dist.bench.harness import Group, Measured, Metric, Spread, ratios
from roformer_dist.bench.machine import load_average, now

SCHEMA = 1


@dataclass(frozen=True)
class Result:
    """A group, what was measured of it, and the figures to compare."""

    group: Group
    measured: Sequence[Measured]
    metrics: Sequence[Metric]

    @property
    def ours(self) -> Measured | None:
        """What peers are compared with."""
        return next((m for m in self.measured if m.contender.role == "ours"), None)

    def ratio(self, other: Measured, metric: Metric) -> Spread | None:
        """Median and spread of ours over ``other``; None for ours itself, or without pairs."""
        if self.ours is None or other is self.ours:
            return None
        return Spread.of(ratios(self.ours, other, metric))


def result_table(result: Result, *, notes: Sequence[Metric] = ()) -> Table:
    """One row a contender: medians (smallest to largest), and ours over it (median of the pairs).

    Args:
        notes: further figures, whose medians stand below the table.
    """
    table = Table(
        title=escape(result.group.title),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
    )
    table.add_column("contender", min_width=16)
    for metric in result.metrics:
        table.add_column(metric.label, justify="right", no_wrap=True)
        table.add_column("ours ÷ it", justify="right", no_wrap=True)
    for entry in result.measured:
        cells = []
        for metric in result.metrics:
            spread = Spread.of([metric.value(sample) for sample in entry.samples])
            cells += [_spread(spread, metric.show), _spread(result.ratio(entry, metric), "{:.2f}".format)]
        table.add_row(_name(entry), *(escape(cell) for cell in cells))
    table.caption = escape("; ".join(note for metric in notes if (note := _note(result, metric))))
    return table


def remarks(result: Result) -> list[str]:
    """One line for each contender that is missing or failed."""
    lines = []
    for entry in result.measured:
        if entry.contender.missing:
            lines.append(entry.contender.missing)
        elif entry.failure:
            lines.append(f"{entry.contender.name} ({result.group.title}): {entry.failure}")
    return lines


def as_json(
    benchmark: str, results: Sequence[Result], *, parameters: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that was measured, with what is needed to measure it again.

    Args:
        parameters: the exact settings.
        facts: ``machine``, ``versions`` and ``date`` as they were at the start.
    """
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        **facts,
        "finished": now(),
        "load_average_at_end": load_average(),
        "parameters": dict(parameters),
        "groups": [
            {
                "title": result.group.title,
                "parameters": dict(result.group.parameters),
                "contenders": [_entry(result, entry) for entry in result.measured],
            }
            for result in results
        ],
    }


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """All of it or nothing."""
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)


def _entry(result: Result, entry: Measured) -> dict[str, Any]:
    status = "missing" if entry.contender.missing else "failed" if entry.failure else "measured"
    figures = {}
    for metric in result.metrics:
        values = [metric.value(sample) for sample in entry.samples]
        spread, ratio = Spread.of(values), result.ratio(entry, metric)
        figures[metric.key] = {
            "values": values,
            **(asdict(spread) if spread else {}),
            "ours_over_it": asdict(ratio) if ratio else None,
        }
    return {
        "name": entry.contender.name,
        "role": entry.contender.role,
        "status": status,
        "message": entry.contender.missing or entry.failure,
        "figures": figures,
        "samples": [
            {"seconds": s.seconds, "peak_bytes": s.peak, "reported": dict(s.reported)} for s in entry.samples
        ],
    }


def _spread(spread: Spread | None, show: Any) -> str:
    if spread is None:
        return ""
    if spread.low == spread.high:
        return show(spread.median)
    return f"{show(spread.median)}\n{show(spread.low)} to {show(spread.high)}"


def _note(result: Result, metric: Metric) -> str:
    medians = (
        (entry.contender.name, Spread.of([metric.value(sample) for sample in entry.samples]))
        for entry in result.measured
    )
    shown = [f"{name} {metric.show(spread.median)}" for name, spread in medians if spread]
    return f"{metric.label}: {', '.join(shown)}" if shown else ""


def _name(entry: Measured) -> str:
    name, missing = entry.contender.name, entry.contender.missing
    trouble = missing or (f"failed: {entry.failure}" if entry.failure else None)
    return escape(name) if trouble is None else f"{escape(name)}\n[yellow]{escape(trouble)}[/yellow]"
