"""``roformer-dist parity``: which mesh, how it is run, and what is printed."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from roformer_dist.config import Config, load_config
from roformer_dist.parity.check import Report, check_in_process, precisions_of
from roformer_dist.parity.processes import check_on_processes

# Replicas of in-process meshes up to this many ranks; above, one is enough to wait for.
TWO_REPLICAS_UP_TO = 16


def run_parity(
    file: str | Path,
    overrides: Sequence[str] = (),
    *,
    sp: int | None = None,
    ring: int | None = None,
    zero: int | None = None,
    processes: int | None = None,
    as_json: bool = False,
) -> bool:
    """Compare what a configuration trains, print, and say whether everything is within its bounds.

    Raises:
        ValueError: the mesh does not fit the configuration, ``overrides`` or the number of processes.
    """
    started, given = time.perf_counter(), load_config(file, overrides)
    config = with_mesh(given, sp=sp, ring=ring, zero=zero)
    _check_overrides(overrides, given, config, sp=sp, ring=ring)
    sp_size, precisions = config.parallel.sp_size, precisions_of(config)
    if processes is None:
        if zero is not None:
            raise ValueError(
                f"--zero {zero} is DeepSpeed's, which ranks in threads do without; add --processes N"
            )
        # Copies among the processes of a node are DeepSpeed's too.
        config = config.model_copy(
            update={"parallel": config.parallel.model_copy(update={"hpz_partition_size": 1})}
        )
        report = check_in_process(config, precisions, 2 if sp_size <= TWO_REPLICAS_UP_TO else 1)
    else:
        if processes % sp_size:
            raise ValueError(
                f"--processes {processes} is not a multiple of sp_size = {sp_size}; take {sp_size} or give --sp"
            )
        if processes % config.parallel.hpz_partition_size:
            raise ValueError(
                f"--processes {processes} is not a multiple of parallel.hpz_partition_size = "
                f"{config.parallel.hpz_partition_size}; take that many or set it to 1"
            )
        report = check_on_processes(config, precisions, processes)
    report.facts["seconds"] = f"{time.perf_counter() - started:.1f}"
    if as_json:
        print(json.dumps({"passed": report.passed, **report.facts, "rows": report.rows()}, indent=2))
    else:
        print_report(report, Console())
    return report.passed


def with_mesh(config: Config, *, sp: int | None, ring: int | None, zero: int | None) -> Config:
    """``config`` on another mesh or ZeRO stage; ValueError where it does not fit."""
    values: dict[str, Any] = config.model_dump()
    if sp is not None or ring is not None:
        size, ring_size = sp or config.parallel.sp_size, ring or config.parallel.ring_size
        if size % ring_size:
            raise ValueError(
                f"a ring of {ring_size} does not divide sp_size = {size}; give --ring with a divisor of it"
            )
        if size // ring_size > config.model.num_heads:
            raise ValueError(_too_few_heads(config, size, ring_size))
        # Ulysses takes what the ring leaves.
        values["parallel"] |= {"sp_size": size, "ring_size": ring_size, "ulysses_size": None}
        if size == 1:
            values["parallel"]["head_chunks"] = 1
    if zero is not None:
        values["parallel"]["zero_stage"] = zero
    try:
        return Config.model_validate(values)
    except ValueError as error:
        raise ValueError(str(error).partition("Value error, ")[2].partition(" [type=")[0] or error) from None


def _too_few_heads(config: Config, size: int, ring_size: int) -> str:
    """What is wrong with a mesh that leaves Ulysses more ranks than heads, and what would fit."""
    heads = config.model.num_heads
    ring = next(ring for ring in range(1, size + 1) if size % ring == 0 and size // ring <= heads)
    try:
        with_mesh(config, sp=size, ring=ring, zero=None)
        advice = f"give --ring {ring}"
    except ValueError:
        advice = f"give --sp {heads} or less"
    return (
        f"sp_size = {size} with a ring of {ring_size} leaves {size // ring_size} ranks to Ulysses, which gives each at "
        f"least one of model.num_heads = {heads}; {advice}"
    )


def _check_overrides(
    overrides: Sequence[str], given: Config, config: Config, *, sp: int | None, ring: int | None
) -> None:
    """ValueError where --sp and --ring make something else of a size that --set asks for."""
    options = " ".join(f"--{name} {size}" for name, size in (("sp", sp), ("ring", ring)) if size is not None)
    sizes = {"sp_size": config.parallel.sp_size, "ulysses_size": config.parallel.ulysses}
    for name, size in (sizes | {"ring_size": config.parallel.ring_size}).items():
        wanted = getattr(given.parallel, name)
        asked = any(override.partition("=")[0].strip() == f"parallel.{name}" for override in overrides)
        if asked and wanted != size:
            raise ValueError(
                f"{options} makes {name} = {size}, and --set parallel.{name}={wanted} asks for another; leave one out "
                "(sp_size is ulysses_size x ring_size)"
            )


def print_report(report: Report, console: Console) -> None:
    """The table, one row for each kind of comparison, and the worst offenders of what failed."""
    for name, fact in report.facts.items():
        console.print(f"{name:>9}  {fact}", highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("precision", "compared", "of", "worst"):
        table.add_column(column, overflow="fold")
    for column in ("error", "allowed", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for row in report.rows():
        allowed = row["allowed"]
        share = f"{100 * row['error'] / allowed:.1f} %" if allowed else "-"
        table.add_row(
            row["precision"],
            row["compared"],
            str(row["count"]),
            row["worst"],
            f"{row['error']:.2g}",
            f"{allowed:.2g}",
            share,
            f"[red]{row['failed']} FAILED[/red]" if row["failed"] else "[green]ok[/green]",
        )
    console.print(table)
    console.print(verdict(report), highlight=False)


def verdict(report: Report) -> str:
    """One line: whether the mesh computes what one process computes."""
    failed = [row for row in report.rows() if row["failed"]]
    if not failed:
        return "the mesh computes what one process computes"
    first = max(failed, key=lambda row: row["error"] / (row["allowed"] or 1e-30))
    return (
        f"the mesh does not compute what one process computes: {first['compared']} ({first['worst']}) in "
        f"{first['precision']} is off by {first['error']:.3g}, {first['allowed']:.3g} is allowed"
    )
